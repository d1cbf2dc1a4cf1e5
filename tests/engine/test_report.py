"""Reports: what a run folder keeps, how runs are read and grouped, and the page in a browser."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from engine import report
from engine.report import refresh, write_report
from engine.runs import load_run
from engine.seen import chosen, encoded, overlays
from engine.train import run as train
from tests.trainings import small_config
from utils.logging import MetricsWriter

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_page_needs_the_run_folder_alone_and_shows_names_as_text(make_run, split, tmp_path):
    folder = make_run("one")
    for record in split.records:
        record.image.unlink()
        record.mask.unlink()
    page = write_report([folder], tmp_path / "page.html").read_text()
    assert "&lt;b&gt;cat" in page and "<b>cat" not in page and "</script><img" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page) and "from 4: seg 0.1" in page
    assert page.count("weight 0 so far") == 1
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("loss_weights", "other"))  # the method has its own
    assert "weight 0 so far" not in write_report([folder], tmp_path / "page.html").read_text()


def test_every_image_has_its_numbers_and_its_change(make_run):
    seen = load_run(make_run("one")).seen["val"]
    assert seen["step"] == 8 and seen["before"]["step"] == 4 and len(seen["sweep"]["cam"]) == 60
    assert all(len(values) == 5 and all(0 <= v <= 100 for v in values) for values in seen["iou"].values())
    assert {len(picture[1].shape) for picture in overlays(seen)} == {3}


def test_a_run_without_validation_draws_training_images(demo_folder, tmp_path):
    cfg = small_config("CAMNetwork", tmp_path, demo_folder)
    cfg.data.val_set, cfg.device = None, "cpu"
    train(cfg)
    [content] = load_run(tmp_path / "run").seen.values()
    samples = content["samples"]
    assert samples and all("cam" in sample["maps"] for sample in samples)


def test_worst_best_and_most_changed_images_are_drawn():
    iou = [50.0] * 40
    iou[7], iou[8] = 0.0, 100.0
    old = [*iou[:9], 90.0, *iou[10:]]
    content = {"names": list(range(40)), "iou": {"seg": iou}, "before": {"iou": {"seg": old}}}
    assert {7, 8, 9} < set(chosen(content, count=2)) and len(chosen(content, count=2)) <= 8


def test_map_keeps_ids_and_scores():
    label, score = torch.tensor([[0, 3], [255, 7]]), torch.tensor([[0.0, 1.0], [0.2, 0.6]])
    red, green, _ = (torch.tensor(list(band.getdata())) for band in opened(encoded(label, score)).split())
    assert red.tolist() == [0, 3, 255, 7] and green.tolist() == [0, 255, 51, 153]


def opened(uri):
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_are_in_tensorboard(make_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_run("one")
    writer = MetricsWriter(folder, 8)
    refresh(folder, writer, 8)
    writer.close()
    tags = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
    assert len(tags["images"]) == 5 and {"loss/cls", "val/seg"} <= set(tags["scalars"])
    assert (folder / "report.html").is_file()


def test_a_broken_report_ends_no_training(make_run, caplog, monkeypatch):
    monkeypatch.setattr(report, "write_page", lambda *_: 1 / 0)
    refresh(make_run("one"), None, 8)
    assert "ZeroDivisionError" in caplog.text


PROBE = """<script>
addEventListener("load", async () => {
  const shot = async () => { await redraw(); return cells.map(view => view.canvas.toDataURL()).join(); };
  const seen = { first: await shot(), rows: document.querySelectorAll(".row").length };
  const pick = async name => { document.querySelector(`#layers [value=${name}]`).click(); return shot(); };
  for (const name of ["image", "cam", "errors"]) seen[name] = await pick(name);
  await pick("cam");
  $("threshold").value = 0.9; $("threshold").dispatchEvent(new Event("input")); seen.high = await shot();
  $("order").value = "worst"; $("order").dispatchEvent(new Event("change")); seen.worst = await shot();
  cells[0].canvas.dispatchEvent(new PointerEvent("pointerenter"));
  document.querySelector(".chart svg").dispatchEvent(new PointerEvent("pointermove", { clientX: 200 }));
  seen.read = document.querySelector(".read").textContent;
  seen.wide = document.documentElement.scrollWidth - innerWidth;
  document.body.replaceChildren(JSON.stringify(seen));
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_page_works_in_a_browser(make_run, tmp_path):
    """No message in the console, no sideways scrolling on a phone, and every control changes the pictures."""
    folders = [make_run("one"), make_run("two", 1)]
    page = write_report(folders, tmp_path / "page.html")
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,800"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    seen = json.loads(re.search(r"<body>(.*)</body>", result.stdout, re.DOTALL)[1])
    pictures = [seen[key] for key in ("first", "image", "cam", "errors", "high", "worst")]
    assert len(set(pictures)) == len(pictures) and seen["rows"] == 5
    assert seen["wide"] <= 0 and "one" in seen["read"]
