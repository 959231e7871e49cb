"""Hessians by layer, as a method section: facts, strategies, a choice.

With z a layer's output, H_z the Hessian of the loss with respect to z, and J_n the map from the layer's parameters to
z_n, a layer that is linear in its parameters has the Hessian Σ_{n,m} J_nᵀ H_z[n, m] J_m. What is *known* of a layer is
found out at run time (:mod:`.facts`); each *strategy* is a module that says where it applies, what it costs, and how it
is run; :func:`.choice.choose` is a pure function from facts and a budget to strategies.

- The loss does not depend on the layer: its curvature is zero.
- :mod:`.columns`: the model is piecewise linear after the layer, so that H_z = Jᵀ H_out J with H_out the loss's Hessian
  in the model's output. C columns of a root of H_out, C the outputs of one sample, serve all layers together.
- :mod:`.column_draws`: where columns are too many, the heaviest ones of each sample, and the others mixed by signs.
- :mod:`.chain`: the graph is a chain of segments between cuts, so that each sample's dense Hessian is carried backwards
  from one cut to the one before: linear in depth.
- :mod:`.output_basis`: samples do not interact, so that H_z is block diagonal: v runs over the basis of one sample's z,
  for all samples at once, u = H_z v.
- :mod:`.parameter_basis`: v runs over the basis of the parameters. Needs nothing, exact for any layer.
- :mod:`.output_draws`: an unbiased estimate from random signs on every sample's z, with the directions of largest
  curvature taken exactly where that pays (:mod:`.deflation`).
- :mod:`.parameter_draws`: the same from random signs on the parameters.
"""
