"""Parts of a method that are built from a mapping in its config."""

import pytest

from methods.seco import key_head
from models.heads import LargeFOV, ProjectionHead, create_decoder
from utils.build import build_part


def test_options_reach_the_part_beside_what_the_method_gives():
    head = build_part(ProjectionHead, {"hidden_dim": 5, "bottleneck_dim": 4}, 3, key="method.head")
    assert head.mlp[0].weight.shape == (5, 3) and head.mlp[-1].weight.shape == (4, 5)
    assert isinstance(build_part(ProjectionHead, None, 3, key="method.head"), ProjectionHead)
    assert build_part(key_head, {"hidden_dim": 5}, 3, key="method.head").last_layer is None


@pytest.mark.parametrize(
    ("part", "option"),
    [(ProjectionHead, "hiden_dim"), (ProjectionHead, "in_dim"), (key_head, "out_dim")],
    ids=["typo", "positional", "fixed"],
)
def test_option_that_the_part_does_not_take_is_named_with_its_key(part, option):
    with pytest.raises(KeyError, match=rf"'{option}' is not an argument of method\.head.*hidden_dim"):
        build_part(part, {option: 1}, 3, key="method.head")


def test_decoder_by_name_with_options():
    decoder = create_decoder("large_fov", 8, 3, {"hidden": 4})
    assert isinstance(decoder, LargeFOV) and decoder.conv7.weight.shape == (4, 4, 3, 3)
    with pytest.raises(KeyError, match=r"'hidden' is not an argument of method\.decoder_options.*dilations"):
        create_decoder("aspp", 8, 3, {"hidden": 4})
    with pytest.raises(ValueError, match="did you mean 'large_fov'"):
        create_decoder("largefov", 8, 3)
