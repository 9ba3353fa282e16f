from pathlib import Path

import pytest

import ladimo
from ladimo.convert.methods.registry import METHODS
from ladimo.convert.recipe import Recipe, load_recipe

RECIPES = sorted((Path(ladimo.__file__).parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).method in METHODS


def test_a_recipe_survives_its_dictionary() -> None:
    recipe = Recipe().override({"split.experts": 16, "layers": "0,2-3", "seed": 7})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.split.experts, recipe.split.top_k, recipe.seed) == (16, 2, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split = [", "recipe.toml"),
        ("expert = 8", "expert: unknown key"),
        ("[train]\nlr = 1.0", "train.lr: unknown key"),
        ("tokens = 'many'", "tokens: must be of type int"),
        ("tokens = true", "tokens: must be of type int"),
        ("split = 3", "split: must be a table"),
        ("[split]\nexperts = 2\ntop_k = 3", "split.top_k: must be at most the 2 experts"),
        ("[split]\noutput_scale = 'big'", "split.output_scale: must be one of"),
        ("[policies]\nfast = 0.9\nbalanced = 0.5", "fast <= balanced"),
        ("layers = 'some'", "layers: must be auto, all"),
        ("target_active = 0", "target_active: must be above 0"),
    ],
)
def test_a_broken_recipe_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_layer_lists() -> None:
    assert Recipe(layers="auto").candidate_layers(3) == (0, 1, 2)
    assert Recipe(layers="5,0-2,1").candidate_layers(6) == (0, 1, 2, 5)
    with pytest.raises(ValueError, match="out of range, the model has layers 0 to 2"):
        Recipe(layers="0,3").candidate_layers(3)
    with pytest.raises(ValueError, match="empty range"):
        Recipe(layers="2-1").candidate_layers(3)
