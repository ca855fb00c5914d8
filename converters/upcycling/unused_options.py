"""Options of a dense model's upcycling that the chosen method has no use for, and which would be ignored silently."""

from __future__ import annotations

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.upcycling.spec import Method, Shared, UpcycleSpec

_METHODS: dict[str, Method] = {"split": "split", "drop_ratio": "drop", "drop_mask": "drop"}
"""Options that one method alone reads."""
_SHARED: dict[str, Shared] = {"shared_width": "partition", "shared_weight": "overlap"}
"""Options that one kind of shared expert alone reads."""


def refuse_unused(spec: UpcycleSpec) -> None:
    """Raise BadInputError for an option of a resolved spec that its method does not use.

    An option that has its default value counts as not given.
    """
    plain = UpcycleSpec(num_experts=spec.num_experts, method=spec.method)
    given = {name: getattr(spec, name) for name in (*_METHODS, *_SHARED, "permute")}
    given = {name: value for name, value in given.items() if value != getattr(plain, name)}
    for name, value in given.items():
        said = f"{name} is {value!r}, which"
        if name in _METHODS and spec.method != _METHODS[name]:
            raise BadInputError(f"{said} method {spec.method} does not use; it goes with --method {_METHODS[name]}")
        if name in _SHARED and spec.shared != _SHARED[name]:
            raise BadInputError(
                f"{said} a shared expert of kind {spec.shared} does not use; --shared {_SHARED[name]} does"
            )
        if name == "permute" and spec.clusters_neurons:
            how = "split clustering" if spec.method == "split" else f"method {spec.method}"
            raise BadInputError(f"{said} {how} does not use: activations decide which neurons go together")
