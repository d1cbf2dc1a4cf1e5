"""Checkpoints, merging of scales and mirror images, visiting every image once."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from datasets.base import WeakSegDataset
from engine.config.schema import Infer
from engine.inference import for_each_image, image_split, load_method
from engine.segmentation import multi_scale_segment, on_canvas, scaled_image
from methods.base import Method, Prediction
from methods.one_stage import OneStage
from methods.ws_fcn import WSFCN
from tests.methods.single_stage import grey_levels, small_method
from tests.recorded import recorded
from utils.image import denormalize, normalize, read_mask, write_mask
from utils.weights import load_checkpoint, save_checkpoint


class Gradient(Method):
    """Logits at stride 4 that depend on place and size of the image, so that every view differs."""

    def __init__(self):
        super().__init__(3, {})
        self.seen = []

    def predict(self, image, scales):
        self.seen.append(tuple(image.shape))
        ramp = torch.linspace(0, 1, image.shape[-1]).expand_as(image[:, :1])
        logits = F.avg_pool2d(torch.cat([image[:, :1], image[:, 1:2] * ramp, 1.5 * ramp], 1), 4)
        return Prediction(None, None, image.mean((2, 3))[:, :2], logits)


def segment(method, image, class_label=None, **options):
    return multi_scale_segment(method, image, Infer(**options), class_label)


@pytest.fixture
def image():
    return torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def up(maps, size=(40, 56)):
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def views(image, scale):
    """Logits of an image at one scale and of its mirror image, turned back, both at full size."""
    h, w = image.shape[-2:]
    scaled = image if scale == 1 else up(image, (int(scale * h), int(scale * w)))
    method = Gradient()
    upright, mirrored = (up(method.predict(x, ()).seg_logits) for x in (scaled, scaled.flip(-1)))
    return upright, mirrored.flip(-1)


@pytest.mark.parametrize("merge_flips", ["sum", "max"])
@pytest.mark.parametrize("merge_scales", ["sum", "max"])
def test_merges_mirror_images_then_scales(image, merge_flips, merge_scales):
    how = {"sum": torch.add, "max": torch.maximum}
    found = segment(
        Gradient(), image, scales=(1.0, 1.5, 0.75), merge_flips=merge_flips, merge_scales=merge_scales
    )
    one, two, three = (how[merge_flips](*views(image, scale)) for scale in (1.0, 1.5, 0.75))
    assert_close(found, how[merge_scales](how[merge_scales](one, two), three))


def test_square_size(image):
    method = Gradient()
    assert segment(method, image, size=32, scales=(1.0, 1.25)).shape == (1, 3, 40, 56)
    assert [shape[2:] for shape in method.seen] == [(32, 32), (40, 40)]


def test_mean_of_views_is_the_mean(image):
    found = segment(Gradient(), image, scales=(1.0, 1.5, 0.75), merge_flips="mean", merge_scales="mean")
    assert_close(found, torch.stack([v for s in (1.0, 1.5, 0.75) for v in views(image, s)]).mean(0))


def test_canvas_centres_the_image_in_zeros(image):
    method = Gradient()
    segment(method, image, scales=(1.0, 0.5), flip=False, pad_to=(48, 61))
    assert method.seen == [(1, 3, 48, 61)] * 2
    canvas, inside = on_canvas(image, (48, 61))
    assert torch.equal(canvas[inside], image) and inside[1:] == (slice(4, 44), slice(2, 58))
    canvas[inside] = 0
    assert not canvas.any()


def test_true_tags_rule_out_other_classes(image):
    found = segment(Gradient(), image, class_label=torch.tensor([[1.0, 0.0]]))
    assert set(found.argmax(1).unique().tolist()) <= {0, 1}
    assert_close(found[:, :2], segment(Gradient(), image)[:, :2])


SYSTEMS = {"wsfcn": WSFCN, "onestage": OneStage}
PUBLISHED = {"merge_flips": "mean", "merge_scales": "mean", "resample": "bicubic"}
SCALES = (1.0, 0.5, 1.5, 2.0)


def replayed(method, masks):
    """The method, whose network says ``masks`` (N, K, h, w) in turn, whatever it sees."""
    left = list(masks)

    def predict(image, scales):
        said = torch.stack([left.pop(0) for _ in image])
        return Prediction(None, None, said.new_zeros(len(said), said.shape[1] - 1), said)

    method.predict = predict
    return method


def on_canvases(image, scales, size):
    """Every scale of an image and its mirror image on a canvas, and rows ``top, left, height, width``."""
    batch, pads = [], []
    for scale in scales:
        scaled = scaled_image(image, scale, "bicubic")
        canvas, (_, rows, columns) = on_canvas(torch.cat([scaled, scaled.flip(-1)]), size)
        batch.append(canvas)
        pads += 2 * [[rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start]]
    return torch.cat(batch), torch.tensor(pads)


@recorded("wsfcn_merge", "onestage_merge")
def test_merging_of_masks_matches_reference_values(case):
    case.irrelevant("crop_*")  # windows instead of scales, which no published number uses
    scales, masks = case.setting("scales", SCALES), case.input("masks")
    method = small_method(SYSTEMS[case.name.split("_")[0]], masks.shape[1]).eval()
    h, w = case["image_hw"].tolist()
    image = torch.zeros(1, 3, h, w)
    case.same("pads", on_canvases(image, scales, masks.shape[-2:])[1])
    merged = segment(
        replayed(method, masks),
        image,
        scales=scales,
        pad_to=masks.shape[-2:],
        class_label=case["labels"][None],
        **PUBLISHED,
    )
    case.compare("merged", merged[0])
    case.same("pred", merged.argmax(1)[0])
    if "crf_unary_prob__sub" in case:
        case.compare("crf_unary_prob", method.crf_probs(merged)[0])


@recorded("wsfcn_msloader")
def test_network_inputs_match_reference_values(case, tmp_path):
    image = normalize(grey_levels(case.input("image")))[None]
    scales, size = case.setting("scales", SCALES), case["batch__shape"].tolist()[-2:]
    batch, pads = on_canvases(image, scales, size)
    case.same("pads", pads)
    for name, found in (("batch", batch), ("image_norm", image[0]), ("denorm", denormalize(image[0]) / 255)):
        case.compare(name, found, rtol=1e-3, atol=5e-3)

    canvas, (_, rows, columns) = on_canvas(image, size)
    views = []
    for i, (y0, y1, x0, x1, top, left) in enumerate(case["crop_pads"].tolist()):
        assert (rows.start, columns.start) == (top, left)
        view = canvas[..., y0:y1, x0:x1]
        views.append(view if i % 2 else view.flip(-1))
    case.compare("crop_batch", torch.cat(views), rtol=1e-3, atol=5e-3)

    write_mask(tmp_path / "mask.png", case["mask"])
    mask = read_mask(tmp_path / "mask.png")
    case.same("mask", mask)
    case.same("labels", [(mask == k + 1).any() for k in range(len(case["labels"]))])


def test_every_image_is_visited_once_and_finished_ones_are_not_read(split):
    worked, revisited = [], []
    count = for_each_image(
        WeakSegDataset(split),
        lambda sample: worked.append((sample["name"], tuple(sample["image"].shape))),
        finished=lambda record: record.name in ("1", "3"),
        revisit=lambda record: revisited.append(record.name),
        progress=False,
    )
    assert count == 3 and revisited == ["1", "3"]
    assert worked == [("0", (3, 20, 30)), ("2", (3, 16, 16)), ("4", (3, 24, 24))]


def test_checkpoint_gives_the_network_back_without_its_pretrained_weights(checkpoint):
    loaded = load_method(checkpoint, "cpu")
    state = load_checkpoint(checkpoint)
    assert loaded.step == 7 and loaded.class_names[0] == "background" and not loaded.unmatched
    assert not loaded.method.training
    for key, value in loaded.method.state_dict().items():
        assert torch.equal(value, state["model"][key])


def test_overrides_change_the_checkpoints_config(checkpoint):
    assert load_method(checkpoint, "cpu", ["infer.scales=[0.5]"]).cfg.infer.scales == [0.5]
    with pytest.raises(KeyError, match=r"infer\.scales"):
        load_method(checkpoint, "cpu", ["infer.scale=[0.5]"])
    with pytest.raises(ValueError, match="does not fit its config"):
        load_method(checkpoint, "cpu", ["method.backbone.width=64"])


def test_weights_without_a_place_are_listed_and_missing_ones_refused(checkpoint, tmp_path):
    state = load_checkpoint(checkpoint)
    state["model"]["stranger"] = torch.zeros(1)
    save_checkpoint(tmp_path / "more.pth", state)
    loaded = load_method(tmp_path / "more.pth", "cpu")
    assert loaded.unmatched == ["not used: stranger"] and "stranger" in loaded.describe()
    del state["model"]["classifier.weight"]
    save_checkpoint(tmp_path / "less.pth", state)
    with pytest.raises(ValueError, match=r"1 of \d+ weights are missing, first 'classifier\.weight'"):
        load_method(tmp_path / "less.pth", "cpu")


@pytest.mark.parametrize("num_classes, size", [(21, "native"), (81, 448)])
def test_published_checkpoint_brings_data_set_and_protocol(published_toco, num_classes, size):
    path, image, expected = published_toco(num_classes)
    loaded = load_method(path, "cpu")
    assert loaded.source == "published toco" and len(loaded.class_names) == num_classes
    assert loaded.cfg.infer.size == size and loaded.cfg.data.name == {21: "voc", 81: "coco"}[num_classes]
    assert any("proj_head" in line for line in loaded.unmatched)
    assert_close(loaded.method.predict(image, ()).seg_logits, expected)


def test_photos_of_a_folder_become_a_split(split):
    folder = split.records[0].image.parent
    photos = image_split(folder, split.class_names)
    assert [record.name for record in photos.records] == ["0", "1", "2", "3", "4"]
    assert all(record.mask is None and record.tags is None for record in photos.records)
    assert [r.name for r in image_split(folder / "2.png", split.class_names).records] == ["2"]
    with pytest.raises(FileNotFoundError):
        image_split(folder / "none.jpg", split.class_names)
