"""Where a model's weights live on a mesh."""

from typing import Any

from rljax.models.config import DecoderConfig
from rljax.models.decoder import abstract_params, logical_axes
from rljax.parallel import RULES, AnyMesh, Rules, shardings


def param_shardings(config: DecoderConfig, mesh: AnyMesh, rules: Rules = RULES) -> dict[str, Any]:
    """The params' tree with a `NamedSharding` on each leaf, for `load_model(shardings=)`, jit and `reshard`.

    Whole heads go to a device. When the `tensor` axis does not divide the key and value heads (grouped-query attention
    has few), these small projections are replicated along it. ValueError when it does not divide the query heads, or
    when another dimension does not divide over its mesh axes, or the mesh splits experts of a model without them.
    """
    if config.num_heads % _size(mesh, rules["heads"]):
        raise ValueError(
            f"num_heads={config.num_heads} does not divide over mesh axis {rules['heads']}="
            f"{_size(mesh, rules['heads'])}; choose a size that divides it, or map 'heads' to None in the rules"
        )
    if config.experts is None and _size(mesh, "expert") > 1:
        raise ValueError(
            f"mesh axis expert={_size(mesh, 'expert')} splits experts, which this model does not have; set "
            "config.mesh.expert=1, and another axis in its place"
        )
    if config.num_kv_heads % _size(mesh, rules["kv_heads"]):
        rules = {**rules, "kv_heads": None}
    return shardings(mesh, logical_axes(config), abstract_params(config), rules)


def _size(mesh: AnyMesh, axes: str | tuple[str, ...] | None) -> int:
    size = 1
    for name in (axes,) if isinstance(axes, str) else axes or ():
        size *= mesh.shape[name]
    return size
