"""SEAM: the authors' network, losses and merging of scales, and what must hold for any input."""

import torch
from torch.testing import assert_close

import methods.seam
from methods.seam import SEAM, Output, PixelCorrelation, stretch
from ops.cam import background_score, summed_cam
from tests.cams import scored_label
from tests.methods.recorded import check_gradients, recorded_network, scale_pairs
from tests.recorded import GOLDEN, GoldenCase, recorded

RESNET = {"name": "resnet38d"}
SMALL = {"name": "resnet38d", "width": 4, "dropout": (0.0, 0.0)}
VIT = {"name": "vit_demo", "width": 32, "depth": 4, "heads": 2, "image_size": 64, "pyramid": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class GivenMaps(SEAM):
    """Maps come from a recorded case instead of the network, the first for the large view."""

    def given(self, *outputs):
        self.outputs = list(outputs)
        return self

    def network(self, image):
        return self.outputs.pop(0)


def parts(case):
    """The stored loss terms under our names; the two views of a term are one."""
    return {
        "cls": (case["cls1"] + case["cls2"]) / 2,
        "min_pool": (case["rvmin1"] + case["rvmin2"]) / 2,
        "er": case["er"],
        "ecr": case["ecr1"] + case["ecr2"],
    }


def check_losses(case, losses, rtol, atol):
    for name, value in parts(case).items():
        assert_close(losses[name].to(value.dtype), value, rtol=rtol, atol=atol)
    case.compare("loss_cls", losses["cls"] + losses["min_pool"], rtol=rtol, atol=atol)
    case.compare("total", sum(losses.values()), rtol=rtol, atol=atol)


@recorded("ms_seam_loss")
def test_loss_of_given_maps_matches_the_authors(case):
    cam, rv, small_cam, small_rv = maps = [
        case.input(key).requires_grad_() for key in ("cam1", "rv1", "cam2", "rv2")
    ]
    b, k, h, w = cam.shape
    method = GivenMaps(k, SMALL).given(
        *(Output(m, refined, m[:, 1:].mean((2, 3))) for m, refined in ((cam, rv), (small_cam, small_rv)))
    )
    losses, _ = method({"image": torch.zeros(b, 3, h, w), "class_label": case["label"][:, 1:].float()}, 0)
    check_losses(case, losses, rtol=1e-5, atol=1e-5)
    channels = case.meta["grad_channels"]
    gradients = torch.autograd.grad(sum(losses.values()), maps)
    for name, gradient, stride in zip(("cam1", "rv1", "cam2", "rv2"), gradients, (4, 4, 2, 2)):
        case.compare(f"grad_{name}", gradient[:, channels, ::stride, ::stride], rtol=1e-4, atol=1e-7)


@recorded("ms_seam_pcm")
def test_pixel_correlation_matches_reference_values_and_gradient(case):
    cam, features = case.input("cam"), case.input("f").requires_grad_()
    widths = (64, features.shape[1] - 3 - 64)
    module = PixelCorrelation((8, 8), widths, case.setting("embed_dim", 192))
    case.load_author_weights(module.embed, {"weight": "f9.weight"})
    out = module.correlate(cam, features)
    case.compare("out", out, atol=1e-5)
    case.compare("out_low_res_cam", module.correlate(cam[:, :, ::2, ::2], features), atol=1e-5)
    (out * case.input("w")).sum().backward()
    case.compare("grad_f_sub", features.grad[:, ::13], rtol=1e-4, atol=1e-5)
    gradient = module.embed.weight.grad
    case.compare("grad_f9_norm", gradient.norm(), atol=1e-5)
    case.compare("grad_f9_sub", gradient.flatten()[::585][:64], rtol=1e-4, atol=1e-5)


@recorded("ms_seam_net")
def test_network_matches_the_authors(case):
    classes = case["cam_mean"].shape[1]
    method = recorded_network(lambda: SEAM(classes, RESNET), case, "seam", torch.float32)
    with torch.no_grad():
        out = method.network(case.input("image"))
    for maps, name in ((out.cam, "cam"), (out.refined, "cam_rv")):
        case.compare(f"{name}_sub", maps[:, :, ::6, ::6], **CLOSE)
        case.compare(f"{name}_mean", maps.double().mean((2, 3)), **CLOSE)


@recorded("ms_seam_step")
def test_step_matches_the_authors(case):
    classes, class_label = case["label"].shape[1], case["label"][:, 1:].float()
    method = recorded_network(lambda: SEAM(classes, RESNET), case, "seam", torch.float32)
    views = []
    method.backbone.register_forward_pre_hook(lambda module, inputs: views.append(inputs[0]))
    losses, _ = method({"image": case.input("image"), "class_label": class_label}, 0)
    case.same("img2_shape", views[1].shape)
    case.compare("img2_sub", views[1][:, :, ::3, ::3], **CLOSE)
    check_losses(case, losses, **CLOSE)
    sum(losses.values()).backward()
    check_gradients(case, method, "seam", rtol=2e-3)


@recorded("ms_seam_cam_merge")
def test_merging_of_scales_matches_the_authors(case):
    pairs = scale_pairs(case, rectify=False)
    classes = next(iter(pairs.values())).shape[1]
    method = GivenMaps(classes, SMALL).given(*(Output(None, maps, None) for maps in pairs.values()))
    size = tuple(case.meta["size"])
    refined = lambda views: (method.network(views).refined[:, 1:],)  # noqa: E731
    (total,), _ = summed_cam(refined, torch.zeros(1, 3, *size), case.meta["scales"], [size])
    label = case["label"][None].float()
    published = stretch(total * label[:, :, None, None])
    present = label[0] > 0
    case.compare("norm_cam", published[0, present], atol=1e-5)
    absent = published[0, ~present]
    case.compare("absent_value", torch.stack([absent.min(), absent.max()]), rtol=0, atol=1e-5)
    for key in case.starting("pred_"):
        case.same(key, scored_label(published, label, int(key.removeprefix("pred_")) / 100)[0])
    for key in case.starting("bg_alpha"):
        score = background_score(published[0, present], float(key.removeprefix("bg_alpha")))
        case.compare(key, score[::2, ::2], atol=1e-5)


# -- any input


def small_batch(classes=3, size=48):
    torch.manual_seed(0)
    return {"image": torch.randn(2, 3, size, size), "class_label": torch.eye(2, classes)}


def test_large_images_are_correlated_block_by_block(monkeypatch):
    module = PixelCorrelation((4, 4), (4, 4), 8)
    attention, features = torch.rand(2, 5, 7, 9), torch.randn(2, 11, 7, 9)
    whole = module.correlate(attention, features)
    monkeypatch.setattr(methods.seam, "_MAX_PAIRS", 2 * 63 * 10)
    assert_close(module.correlate(attention, features), whole)


def test_new_layers_learn_ten_times_as_fast_as_published():
    weights, _, new, _ = GoldenCase(GOLDEN / "ms_seam_net.npz").meta["group_sizes_before_train"]
    with torch.device("meta"):
        groups = SEAM(21, RESNET).parameter_groups()
    sizes = {group["name"]: (len(group["params"]), group["lr_scale"]) for group in groups}
    # The authors' groups hold the eight frozen convolutions too.
    assert sizes == {"backbone_weight": (weights - 8, 1), "new_weight": (new, 10)}


def test_features_of_a_vit_are_pooled_by_their_maximum():
    """Logits of the strongest response of each feature, the mean of the maps without the option."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 48, 48)
    mean, most = (SEAM(4, VIT, dropout=0.0, pooling=pooling).eval() for pooling in ("mean", "max"))
    most.load_state_dict(mean.state_dict())
    a, b = mean.network(image), most.network(image)
    features = mean.backbone(image)[-1]
    weight = mean.classifier.weight[1:, :, 0, 0]
    assert_close(a.class_logits, a.cam[:, 1:].mean((2, 3)))
    assert_close(b.class_logits, features.amax((2, 3)) @ weight.T)
    assert_close(a.cam, b.cam)
