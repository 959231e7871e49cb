"""Where samples are in each layer: found and verified on a batch that is looked at, used where that explains others.

As a batch is looked at:

- :mod:`.search`: the whole look, by passes of our own.
- :mod:`.sample_dimension`: which dimension of the arguments holds the samples; :mod:`.told_dimensions`: those told.
- :mod:`.hypotheses`: what may hold them, and the trials that it must pass; :mod:`.integers`: where integers alone do.
- :mod:`.forward_graph`: what the graph of the forward that is looked at tells by itself.
- :mod:`.rows`: whose rows a layer returns; :mod:`.use_rows`: whose rows operations meet its parameters in.
- :mod:`.routes`: rows whose samples depend on data.
- :mod:`.outside`: layers whose own calls are not enough.
- :mod:`.beside`: what the forward makes beside outputs of samples, such as an auxiliary loss: is it a sum over these?

As a batch is recorded:

- :mod:`.attribution`: what the looks have found.
- :mod:`.relation`: where samples are in a call, by the relation between shapes that was verified.
"""
