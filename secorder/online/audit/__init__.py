"""Do the calls that were captured explain the whole gradients, and what do gradients hold beside?

- :mod:`.freivalds`: the check of each backward, of random vectors' products with both sides.
- :mod:`.compared`: the numbers, of which a weight and its bias are one.
- :mod:`.directions`: these vectors; :mod:`.rounding`: what difference is accepted between the sides.
- :mod:`.audited`: which layers are checked in a backward, as far as a step pays for it.
- :mod:`.failures`: how many checks each layer has failed, read when numbers are.
- :mod:`.penalty`: what a penalty that is told of adds, the same for each sample.
- :mod:`.uncalled`: layers that no recorded forward has called, and that something else trains.
"""
