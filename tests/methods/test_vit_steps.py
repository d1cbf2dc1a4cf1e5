"""Whole training steps of ToCo, MCC and SeCo: the values of the authors' programs."""

import pytest
import torch

from losses.tag_contrast import local_to_global_contrast
from methods.mcc import MCC
from methods.seco import SeCo
from methods.toco import ToCo
from ops.cam import present_classes
from ops.labels import region_mask
from tests.formula import stats
from tests.methods.authors import author_name
from tests.methods.recorded import remembering
from tests.recorded import recorded

# What meta may call an option of a method.
ALIASES = {
    "low_threshold": "low_threshold|low_thre|low_thr|low",
    "high_threshold": "high_threshold|high_thre|high_thr|high",
    "cam_scales": "cam_scales|scales",
    "local_crop_size": "local_crop_size|crop_size|local_size",
    "temperature": "temperature|temp",
    "prototype_momentum": "prototype_momentum|proto_m|proto_momentum",
    "temperature_lil": "temperature_lil|temp_lil",
    "temperature_lig": "temperature_lig|temp_lig",
    "prototype_from_step": "prototype_from_step|update_prototype",
    "tag_source": "tag_source|cam2mask",
}
VIT = {"low_threshold": 0.25, "high_threshold": 0.7, "cam_scales": (1.0, 0.5, 1.5), "momentum": 0.9}


class Recorded:
    """Random draws come from the recorded case; intermediate values of a step are kept."""

    case, phase = None, ""

    def crop_order(self, batch, n):
        self.candidates = dict(enumerate(n.tolist()))
        if isinstance(self, SeCo):
            return super().crop_order(batch, n)
        count = self.num_local_crops
        return torch.stack([self.case.permutation(f"step/perm{i}", int(k))[:count] for i, k in enumerate(n)])

    def sample_crops(self, batch, aux_cam, present):
        crops, self.flags = super().sample_crops(batch, aux_cam, present)
        region = region_mask(aux_cam, present.label, self.low_threshold, self.high_threshold)
        self.regions = torch.bincount(region.long().flatten(), minlength=3)
        return crops, self.case[f"{self.phase}/flags"]

    def hidden_cells(self, batch, i, grid):
        draws = range(self.num_masks * i, self.num_masks * (i + 1))
        return torch.stack([self.case.bernoulli(f"step/u{n}", grid, self.mask_rate) for n in draws])

    def visible_objects(self, cam, present, masks):
        self.masks, self.flags = masks, super().visible_objects(cam, present, masks)
        return self.flags

    def multi_scale(self, *args):
        self.cams = super().multi_scale(*args)
        return self.cams

    def pseudo_label(self, *args):
        self.label = super().pseudo_label(*args)
        return self.label

    def token_label(self, *args):
        self.tokens = super().token_label(*args)
        return self.tokens

    def decompose(self, *args):
        positions, self.tags = super().decompose(*args)
        return positions, self.tags

    def teach(self, *args):
        self.taught = super().teach(*args)
        return self.taught


def recorded_batch(case):
    b, h, w = case[f"{case.tags()[0]}/refined_label"].shape
    h, w = case.setting("image_size|size", (2 * h, 2 * w))
    views = {"image": "step/main", "global_view": "step/w", "strong_view": "step/s"}
    batch = {key: case.step_image(name, b, h, w) for key, name in views.items()}
    return batch | {
        "class_label": case["y"].float(),
        "valid_box": case["box"].long(),
        "sample_seed": torch.arange(b),
    }


def recorded_method(case, kind, backbone, weights, **options):
    """A method with the weights of a case; options are the defaults of what ``meta`` does not say."""
    options = {name: case.setting(ALIASES.get(name, name), value) for name, value in (VIT | options).items()}
    spec = {"name": case.setting("backbone", backbone), "aux_layer": case.setting("aux_layer", -3)}
    weights = {
        name: case.setting(f"w_{name}|weight_{name}|weights/{name}", weight)
        for name, weight in weights.items()
    }
    method_class = type(f"Recorded{kind.__name__}", (Recorded, kind), {})
    # On meta, because to initialise 100 million weights takes seconds.
    with torch.device("meta"):
        method = method_class(case["y"].shape[1] + 1, spec, loss_weights=weights, **options)
    method.case, method.queries, method.candidates = case, [], {}
    case.load_author_weights(method, {key: author_name(key) for key in method.state_dict()})
    method.proj_head.register_forward_hook(lambda module, inputs, output: method.queries.append(output))
    for name in ("backbone", "teacher_backbone"):  # phases show them the same images
        if hasattr(method, name):
            backbone = method.get_submodule(name)
            backbone.forward = remembering(backbone.forward)
    return method


def check_losses(case, phase, method, losses, step, names):
    """Each recorded loss and the phase's weighted sum, which is returned."""
    for name, recorded_name in names.items():
        rtol = 1e-3 if name.startswith("cls") else 5e-3
        case.compare(f"{phase}/loss_{recorded_name}", losses[name], rtol=rtol)
    total = sum(method.loss_weight(name, step) * loss for name, loss in losses.items())
    case.compare(f"{phase}/total", total, rtol=5e-3)
    return total


def check_labels(case, phase, method, class_label):
    """CAMs, recorded for every fifth class of which the present ones are computed, and labels."""
    present = present_classes(class_label)
    for name, cam in zip(("cam", "cam_aux"), method.cams):
        every = torch.zeros(*class_label.shape, *cam.shape[-2:])
        for i, channels in enumerate(present.channels):
            every[i, channels[present.label[i] > 0]] = cam[i, present.label[i] > 0]
        stored = case[f"{phase}/{name}_sub"]
        known = class_label[:, ::5, None, None] > 0
        torch.testing.assert_close(
            every[:, ::5, ::12, ::12].where(known, stored), stored, rtol=1e-4, atol=1e-4
        )
    case.irrelevant(f"{phase}/cam*_stats")  # of all classes
    case.same(f"{phase}/refined_label", method.label[:, ::2, ::2], differing=0.005)
    histogram = torch.bincount(method.label.flatten(), minlength=256)
    assert (histogram - case[f"{phase}/refined_hist"]).abs().sum() <= 0.01 * method.label.numel()
    case.same(f"{phase}/ptc_label", method.tokens, differing=0.005)


def check_gradients(case, phase, method):
    groups = method.parameter_groups()
    assert [g["name"] for g in groups] == ["backbone", "backbone_norm", "heads", "decoder"]
    norms = [torch.stack([p.grad.norm() for p in g["params"]]).norm().double() for g in groups]
    case.compare(f"{phase}/grad_norm_groups", torch.stack(norms), rtol=1e-2)
    classifier, qkv = method.classifier.weight.grad, method.backbone.blocks[5].attn.qkv.weight.grad
    case.compare(f"{phase}/grad_classifier", classifier[::4, ::32, 0, 0], rtol=5e-3, atol=0, share=1e-3)
    case.compare(f"{phase}/grad_qkv5_sub", qkv[::64, ::64], rtol=5e-3, atol=0, share=1e-3)
    embed, entry = stats(method.backbone.patch_embed.proj.weight.grad), f"{phase}/grad_patch_embed_stats"
    if entry in case:
        torch.testing.assert_close(embed[1:], case[entry][1:], rtol=5e-3, atol=1e-6)
    case.same(f"{phase}/n_params_with_grad", sum(p.grad is not None for p in method.parameters()))


def step_of(case, phase):
    return int(case[f"{phase}/n_iter"]) if f"{phase}/n_iter" in case else case.setting("n_iter", 0, phase)


@recorded("vit_step_toco", "vit_step_mcc")
def test_steps_of_toco_and_mcc_match_reference_values(case):
    batch, toco = recorded_batch(case), case.name == "vit_step_toco"
    pair, contrast = ("ptc", "ctc") if toco else ("aff", "mcc")
    names = {"cls": "cls", "cls_aux": "cls_aux", pair: "ptc", "seg": "seg", contrast: "contrast"}
    # Without the energy term.
    weights = {"cls": 1, "cls_aux": 1, pair: 0.2, contrast: 0.5, "seg": [[0, 0.0], [2001, 0.1]]}
    views = case[f"{case.tags()[0]}/flags"].shape[1] - 2
    if toco:
        options = {"local_crop_size": 96, "num_local_crops": views}
    else:
        options = {"mask_rate": 0.7, "mask_scale": 4, "num_masks": views}
    kind = ToCo if toco else MCC
    method = recorded_method(case, kind, "deit_small_patch16_224", weights, temperature=0.5, **options)
    teacher_start = {key: value.clone() for key, value in method.teacher_head.state_dict().items()}
    for phase in case.tags():
        method.phase, step = phase, step_of(case, phase)
        method.teacher_head.load_state_dict(teacher_start)
        losses, _ = method(batch, step)
        method.zero_grad(set_to_none=True)
        check_losses(case, phase, method, losses, step, names).backward(retain_graph=True)
        if toco:
            case.compare(f"{phase}/flags_computed", method.flags)
            sizes, regions = list(method.candidates.values()), method.regions
            assert sizes == pytest.approx(case[f"{phase}/perm_sizes"].tolist(), rel=5e-3)
            assert regions.tolist() == pytest.approx(case[f"{phase}/roi_hist"].tolist(), rel=5e-3)
        else:
            case.compare(f"{phase}/flags", method.flags)
            case.same(f"{phase}/masks", method.masks)
        check_labels(case, phase, method, batch["class_label"])
        check_gradients(case, phase, method)
        case.compare(f"{phase}/out_s_sub", method.queries[-1][:, ::8], rtol=1e-3, atol=1e-4)
        case.compare(f"{phase}/out_t_sub", method.taught[:, ::8], rtol=1e-3, atol=1e-4)
        teacher = dict(method.teacher_head.named_parameters())
        case.compare(f"{phase}/teacher_bias_stats", stats(teacher["mlp.4.bias"]))
        scale = teacher["last_layer.parametrizations.weight.original0"].flatten()
        case.compare(f"{phase}/teacher_g", scale[: len(case[f"{phase}/teacher_g"])])


@recorded("vit_step_seco")
def test_steps_of_seco_match_reference_values(case, monkeypatch):
    names = {name: name for name in ("cls", "cls_aux", "ptc", "lil", "lig", "seg")}
    weights = {"cls": 1, "cls_aux": 1, "ptc": 0.3, "seg": [[0, 0.0], [2001, 0.12]]}
    weights |= {"lil": [[0, 0.0], [1001, 0.5]], "lig": [[0, 0.0], [1001, 0.5]]}
    options = {"cam_scales": (1.0, 0.5, 0.75, 1.5), "momentum": 0.999, "prototype_momentum": 0.9}
    options |= {"local_crop_size": 64, "num_local_crops": case[f"{case.tags()[0]}/tags"].shape[1] - 2}
    options |= {"queue_size": 4608}
    method = recorded_method(case, SeCo, "vit_base_patch16_224", weights, **options)
    method.queue_tags.copy_(case.ints("step/queue_tags", method.queue_tags.shape, 7) - 1)
    method.queue_ptr.zero_()
    memory = {key: value.clone() for key, value in method.named_buffers()}

    def recorded_lig(query, prototypes, tags, temperature):
        method.revised_tags = tags
        return local_to_global_contrast(query, prototypes, tags, temperature)

    monkeypatch.setattr("methods.seco.local_to_global_contrast", recorded_lig)
    batch = recorded_batch(case)
    class_label = batch["class_label"]
    case.same("label_idx", torch.where(class_label.sum(1) == 1, class_label.argmax(1) + 1, -1))
    norm, bias = method.teacher_backbone.blocks[0].norm1.weight, method.teacher_head.mlp[4].bias
    before = norm.clone(), bias.clone()
    done, phases = None, {phase: step_of(case, phase) for phase in case.tags()}
    for phase, step in phases.items():
        # Phases that read the same CAM and move the prototypes alike differ in weights alone.
        kind = (method.tag_source(step), method.label_source(step), step >= method.prototype_from_step)
        if kind != done:
            method.load_state_dict(memory, strict=False)
            method.teacher_step = -1 if done is None else step  # the update of the first phase serves all
            losses, _ = method(batch, step)
        done = kind
        total = check_losses(case, phase, method, losses, step, names)
        method.zero_grad(set_to_none=True)
        total.backward(retain_graph=True)
        check_gradients(case, phase, method)
        check_labels(case, phase, method, class_label)
        query = method.queries[-1]
        case.same(f"{phase}/tags", method.tags)
        case.same(f"{phase}/tags_revised", method.revised_tags.view_as(method.tags))
        case.compare(f"{phase}/q_sub", query[:, ::16], rtol=1e-3, atol=1e-4)
        case.compare(f"{phase}/k_sub", method.taught[:, ::16], rtol=1e-3, atol=1e-4)
        case.same(f"{phase}/queue_ptr", method.queue_ptr)
        # Of queries, keys and queue.
        flags = 2 * method.tags.sum() + method.queue_tags.sum()
        case.same(f"{phase}/feats_flags_sum", [2 * len(query) + len(method.queue), flags])
        # Records were overwritten by the phases after them. They show the teacher before its update, and
        # where no prototype moves the moved ones of the next phase.
        if step >= method.prototype_from_step:
            case.compare(f"{phase}/proto_sub", method.prototypes[::2, ::24])
            case.compare(f"{phase}/proto_stats", stats(method.prototypes), rtol=1e-4)
        else:
            moved = class_label[class_label.sum(1) == 1].sum(0)[::2, None] > 0
            rows = method.prototypes[::2, ::24].where(~moved, case[f"{phase}/proto_sub"])
            case.compare(f"{phase}/proto_sub", rows)
            case.irrelevant(f"{phase}/proto_stats")
        first, second = (norm, bias) if phase == list(phases)[-1] else before
        case.compare(f"{phase}/enc_k_norm1_0", first[:32])
        case.compare(f"{phase}/head_t_bias", second[: len(case[f"{phase}/head_t_bias"])])
