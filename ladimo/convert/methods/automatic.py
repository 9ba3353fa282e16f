"""The method of a conversion that names none (`--method auto`).

It is `nested`, unless the user asks for what only experts have: then it is `elastic`.
"""

from ladimo.convert.recipe import AUTO, Recipe

# Keys that `nested` cannot obey, with their flags.
OF_EXPERTS = {"split.experts": "--experts", "split.top_k": "--top-k", "target_active": "--target-active"}
FLAGS = {**OF_EXPERTS, "layers": "--layers", "nested.top_bits": "--top-bits"}


def choose_method(recipe: Recipe) -> tuple[str, str]:
    """The method of a recipe, and why, as the end of a sentence. Raises ValueError if keys ask for both methods."""
    if recipe.method != AUTO:
        return recipe.method, "as asked"
    asked = sorted(recipe.asked())
    experts = [key for key in asked if key in OF_EXPERTS or key.startswith("elastic.")]
    if recipe.layers not in ("auto", "all"):
        experts.append("layers")
    bits = [key for key in asked if key.startswith("nested.")]
    if experts and bits:
        raise ValueError(f"{_names(bits)} needs method nested, {_names(experts)} needs elastic; choose one with --method")
    if bits:
        return "nested", f"because of {_names(bits)}"
    if experts:
        return "elastic", f"because of {_names(experts)}"
    return "nested", "the default"


def _names(keys: list[str]) -> str:
    """Keys as users know them: by their flags if they have any."""
    return ", ".join(FLAGS.get(key, key) for key in keys)
