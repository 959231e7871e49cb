"""What is known of a layer in this model, on this batch and for this loss.

- *used*, *own use*: the loss depends on the parameters, and they act only through the recorded calls of the layer, none
  of whose inputs depends on the layer's own output. Read off the structure of the autograd graph, so that it cannot be
  fooled.
- *samples independent*: for each bit of the sample index, a random v on the samples with that bit must give exact zeros
  on the others under H_z. Two samples differ in some bit, so a coupled pair shows for almost every v (a coupling below
  the underflow of the number format does not show).
- *piecewise linear*: with w = ∂L/∂f fixed, ∂²⟨w, f⟩/∂z² v for a random v must be exactly zero in every entry. No
  tolerance is involved. It tells nothing of a backward pass that is not a multiplication with the Jacobian, which the
  columns themselves must show (:func:`.columns.run`).
- *num columns*: the loss goes by the model's output alone, in which it does not couple samples (by bits, as above).
"""

from dataclasses import dataclass

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """What is known of one layer; None where it was not looked at, since nothing depended on it.

    Attributes:
        layer: its name.
        numel: elements of its parameters.
        used: whether the loss depends on it.
        own_use: whether its parameters act through its recorded calls alone.
        outputs: elements of one sample's z, all calls together; 0 where it was not recorded.
        samples_independent: whether H_z is block diagonal over samples.
        piecewise_linear: whether the model is piecewise linear after the layer.
        num_columns: outputs of one sample of the model, where columns of a root of the loss's Hessian in them can be
            pulled back to z; else 0.
        columns_drawn: whether such columns may be drawn: the graph shows that they are multiplied with a Jacobian.
        last: whether z is an output of the model in which the loss's Hessian is known: its columns are given together.
        chain_depth: the place on the chain, from the output backwards; 0 where none leads to the layer.
        chain_work: multiplications that carrying each sample's Hessian to the layer takes, from the place before it.
        chain_products: rows of each sample's Hessian in z that are carried to it, as many as products with a basis.
        chain_seconds: what that took in a short trial, from the place before it; None where none was made.
        basis_work: multiplications that products with the basis of z, or of the parameters, would take.
        passed: numbers that a product passes through: activations that were recorded from the layer on, and outputs.
        passed_by_column: numbers that a column passes through: the outputs.
        output_elements: numbers that a product in z keeps at a time, about.
        parameter_elements: numbers that a product on the parameters keeps at a time, about.
        seconds: that a product in z took in a short trial; 0 where none was made.
        seconds_on_parameters: that one on the parameters took; likewise.
        seconds_by_column: that a column took, for all layers together; likewise.
        num_bytes: memory of as many products as are made at a time, by trials; likewise.
    """

    layer: str
    numel: int
    used: bool = True
    own_use: bool | None = None
    outputs: int = 0
    samples_independent: bool | None = None
    piecewise_linear: bool | None = None
    num_columns: int = 0
    columns_drawn: bool = False
    last: bool = False
    chain_depth: int = 0
    chain_work: int = 0
    chain_products: int = 0
    chain_seconds: float | None = None
    basis_work: int = 0
    passed: int = 0
    passed_by_column: int = 0
    output_elements: int = 0
    parameter_elements: int = 0
    seconds: float = 0.0
    seconds_on_parameters: float = 0.0
    seconds_by_column: float = 0.0
    num_bytes: int = 0

    @property
    def seconds_by_draw(self) -> float:
        """That a draw takes, about; 0 where nothing was tried."""
        return self.seconds or self.seconds_on_parameters

    @property
    def checks(self) -> dict[str, bool]:
        """The outcomes of what was looked at, by name."""
        names = ("own_use", "samples_independent", "piecewise_linear")
        return {name: bool(getattr(self, name)) for name in names if getattr(self, name) is not None}
