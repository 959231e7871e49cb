"""Where samples are in each layer: found and verified on a verification batch, used where that explains others.

As a batch is verified:

- :mod:`.search`: the whole verification, by passes of our own.
- :mod:`.sample_dimension`: which dimension of the arguments holds the samples; :mod:`.specified_dimensions`.
- :mod:`.hypotheses`: what may hold them, and the trials that it must pass; :mod:`.integers`: where integers alone do.
- :mod:`.forward_graph`: what the graph of the forward that is looked at tells by itself.
- :mod:`.rows`: whose rows a layer returns; :mod:`.use_rows`: whose rows operations meet its parameters in.
- :mod:`.routes`: rows whose samples depend on data.
- :mod:`.outside`: layers whose own calls are not enough.
- :mod:`.beside`: what the forward makes beside outputs of samples, such as an auxiliary loss: is it a sum over these?

As a batch is recorded:

- :mod:`.attribution`: what verification has found.
- :mod:`.relation`: where samples are in a call, by the relation between shapes that was verified.
"""
