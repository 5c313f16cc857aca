"""torchvision beside a CPU build of torch, for tests: the schemas of its compiled operators, whose library cannot be loaded there.

The import of torchvision needs the schemas only, and processors use none of the operators. Schemas: torchvision 0.28, csrc/ops.
Normal processes must not see this torchvision: without the schemas, transformers cannot load its models. It lies in a folder of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision"  # made by `make .venv/torchvision/installed`
_GRAD = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_BOX = f"Tensor input, Tensor rois, {_GRAD}"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_CONV = (
    "Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, "
    "SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask"
)
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_BOX}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_GRAD}, {_SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align({_BOX}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_GRAD}, int sampling_ratio, {_SIZES}) -> Tensor",
    f"ps_roi_pool({_BOX}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_GRAD}, {_SIZES}) -> Tensor",
    f"roi_pool({_BOX}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_GRAD}, {_SIZES}) -> Tensor",
    f"deform_conv2d(Tensor input, {_CONV}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, Tensor input, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_library: list[torch.library.Library] = []  # a library that is collected takes its schemas with it


def import_torchvision() -> None:
    """Put the folder on the path of this process, and import torchvision. Where its compiled operators load, no schema is registered."""
    sys.path.insert(0, str(FOLDER))
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library.append(torch.library.Library("torchvision", "DEF"))
        for schema in SCHEMAS:
            _library[0].define(schema)
        import torchvision  # noqa: F401
