"""A training loss L = Σ_n c_n ℓ_n: is it made of samples' losses, how does it weight them, what is it multiplied by?

Each file answers one question, at one time.

As a probe is made:

- :mod:`.reduction`: what the user tells of the weights c_n, and of what L is multiplied by.

As a batch is verified, before its forward (:mod:`secorder.online.attributions`):

- :mod:`.beside`: is what the forward makes beside outputs of samples, such as an auxiliary loss, a sum over these?
- :mod:`.returned`: is the loss that the model returns made as is told?

As a forward ends that is recorded:

- :mod:`.watching`: what is to be watched of it, and in what order its loss is looked at.
- :mod:`.marks`: where the graph has tensors whose rows are known, for a loss to be met there.

As any backward begins:

- :mod:`.kinds`: does the loss end as those did that were looked at, and divide by what counts of each sample?

Of verification batches, and of losses that end otherwise, in the graph that still holds what it has saved:

- :mod:`.seen`: what is between the loss and those tensors, seen once for all that follow.
- :mod:`.extent`: of how many samples is a number there?
- :mod:`.coupling`: does the loss couple samples, by its second derivatives?
- :mod:`.choices`: does it choose among samples, or compare them, which no derivative tells?
- :mod:`.weights`: does it weight samples, by classes or tokens?
- :mod:`.several`: of several forwards, is it one mean over all of them?
- :mod:`.powers`: is it a mean, or a sum, over samples, by what is on each path?
- :mod:`.sizes`: does that go with the number of samples?
- :mod:`.scale`: is it multiplied by a scaler, or what the model returns by a loop?
- :mod:`.accumulation`: is it divided, and are gradients added up?
"""
