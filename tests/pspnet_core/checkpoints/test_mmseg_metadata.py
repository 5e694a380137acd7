"""The metadata of mmsegmentation: settings read out of a config's text, names and colours in every spelling."""

from __future__ import annotations

from typing import Any

import pytest

from pspnet_core.checkpoints.mmseg_metadata import per_class, settings_of
from pspnet_core.errors import ConfigError

# As 0.x writes it, in the order of the base configs.
OLD = """norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='ResNetV1c', out_indices=(0, 1, 2, 3), dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
        norm_cfg=dict(type='SyncBN', requires_grad=True), style='pytorch', contract_dilation=True),
    decode_head=dict(
        type='PSPHead', pool_scales=(1, 2, 3, 6), dropout_ratio=0.1, num_classes=19,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=True,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', dropout_ratio=0.3, align_corners=False))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
"""

# As 1.x writes it: sorted, one entry of most lists in a line.
NEW = """data_preprocessor = dict(
    bgr_to_rgb=True,
    mean=[
        100.5,
        110,
        120.25,
    ],
    std=[1e1, 20, 30.],
    type='SegDataPreProcessor')
model = dict(
    auxiliary_head=dict(align_corners=True, dropout_ratio=0.4, type='FCNHead'),
    backbone=dict(
        contract_dilation=True,
        dilations=(
            1,
            1,
            2,
            4,
        ),
        strides=(1, 2, 1, 1),
        style='pytorch'),
    decode_head=dict(
        align_corners=False,
        dropout_ratio=0.2,
        pool_scales=(1, 2, 4, 8),
        type='PSPHead'))
"""
BASE = {"align_corners": False, "dropout": 0.1, "dilation": "contracted"}


def test_a_text_is_read_by_its_sections() -> None:
    shared = {"output_stride": 8, "dilation": "contracted"}
    assert settings_of({"config": OLD}) == shared | {
        "align_corners": True,
        "dropout": 0.1,
        "bins": (1, 2, 3, 6),
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
    }
    assert settings_of({"cfg": NEW}) == shared | {
        "align_corners": False,
        "dropout": 0.2,
        "bins": (1, 2, 4, 8),
        "mean": (100.5, 110, 120.25),
        "std": (10, 20, 30),
    }


@pytest.mark.parametrize("meta", [{}, {"config": ""}, {"config": None}, {"config": "norm_cfg = dict(type='BN')"}])
def test_without_a_word_the_base_configs_hold(meta: dict[str, Any]) -> None:
    assert settings_of(meta) == BASE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decode_head=dict(align_corners=True)", {"align_corners": True}),
        ("align_corners=True", {"align_corners": True}),
        ("model = dict(decode_head=dict(loss=[dict(a=(1, 2))], align_corners=True))", {"align_corners": True}),
        # Only the auxiliary head's; the main head then has the default.
        ("model = dict(decode_head=dict(channels=1), auxiliary_head=dict(align_corners=True))", {}),
        ("paramwise = dict(decode_head=dict(align_corners=True))\nmodel = dict(decode_head=dict(channels=2))", {}),
        ("decode_head=dict(dropout_ratio=0)", {"dropout": 0}),
        ("model=dict(backbone=dict(contract_dilation=False))", {"dilation": "full"}),
        ("model=dict(backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)))", {"dilation": "full"}),
        ("backbone=dict(dilations=[1, 1, 1, 2], strides=[1, 2, 2, 1], contract_dilation=True)", {"output_stride": 16}),
        ("model=dict(backbone=dict(strides=(1, 2, 2, 2), contract_dilation=True))", {"output_stride": 32}),
        (
            "backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 2, 2), contract_dilation=True)",
            {"output_stride": 32, "dilations": (2, 4)},
        ),
        ("model = dict(decode_head=dict(align_corners=True", {"align_corners": True}),  # cut off
    ],
)
def test_settings_that_a_text_changes(text: str, expected: dict[str, Any]) -> None:
    assert {"output_stride": 8, **settings_of({"config": text})} == {"output_stride": 8, **BASE, **expected}


def test_a_config_may_be_a_dict() -> None:
    config = {"model": {"decode_head": {"align_corners": True, "dropout_ratio": 0.3}}}
    assert settings_of({"config": config}) == BASE | {"align_corners": True, "dropout": 0.3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model=dict(backbone=dict(style='caffe'))", "style='caffe"),
        ("model=dict(backbone=dict(multi_grid=(1, 2, 4)))", "multi_grid=("),
        ("img_norm_cfg = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=False)", "to_rgb=False"),
        ("data_preprocessor=dict(bgr_to_rgb=False)", "to_rgb=False"),
        ("model=dict(backbone=dict(dilations=(1, 1, 1, 4), strides=(1, 2, 2, 2)))", "(1, 2, 2, 2), (1, 1, 1, 4)"),
        ("decode_head=dict(pool_scales=(1, 2.3.4))", "2.3.4"),
        ("decode_head=dict(dropout_ratio=1e)", "1e"),
        ("backbone=dict(strides=(1, --2))", "--2"),
    ],
)
def test_a_network_that_ours_cannot_be_is_refused(text: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        settings_of({"config": text})
    assert raised.value.value == value


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3], [4, 5, 6]]},
        {"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]},
        {"dataset_meta": {"classes": ("a", "b"), "palette": [[1, 2, 3], [4, 5, 6]]}},
        {"dataset_meta": {"CLASSES": ["a", "b"], "PALETTE": ((1, 2, 3), (4, 5, 6))}, "CLASSES": ["x"]},
        {"dataset_meta": {"classes": ["a", "b"]}, "PALETTE": [[1, 2, 3], [4, 5, 6]]},
    ],
)
def test_names_and_colours_in_every_spelling(meta: dict[str, Any]) -> None:
    names, colours = per_class(meta, "classes"), per_class(meta, "palette")
    assert names is not None and colours is not None
    assert list(names) == ["a", "b"]
    assert [list(colour) for colour in colours] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ["a", 1], "PALETTE": [[1, 2]]},
        {"CLASSES": [["a"]], "PALETTE": [1, 2]},
        {},
        {"CLASSES": None},
        {"dataset_meta": None},
        {"dataset_meta": {"PALETTE": "random"}},
    ],
)
def test_names_and_colours_may_be_missing(meta: dict[str, Any]) -> None:
    assert per_class(meta, "classes") is None
    assert per_class(meta, "palette") is None
