"""CAM files of other repositories are read unchanged, and none of them can run code."""

import pickle

import numpy as np
import pytest
import torch

from tests.stages import call
from tools import exchange_cams
from utils.cam_files import CamFile, load_cam
from utils.exchange import NoClassError, load_foreign_cam


def cams(classes=(3, 15)):
    torch.manual_seed(0)
    n, class_ids = len(classes), torch.tensor(classes, dtype=torch.int64)
    return CamFile(class_ids, torch.rand(n, 10, 13), None, (10, 13), torch.rand(n, 3, 4))


def test_irn_dictionary_of_tensors_is_read(tmp_path):
    file = cams()
    content = {"keys": file.class_ids - 1, "cam": file.strided, "high_res": file.cam.numpy()}
    np.save(tmp_path / "a.npy", content)
    found = load_foreign_cam(tmp_path / "a.npy")
    for name in ("class_ids", "cam", "strided"):
        assert torch.equal(getattr(found, name), getattr(file, name))
    assert found.size == (10, 13)


def test_psa_dictionary_is_read(tmp_path):
    file = save_psa(tmp_path / "a.npy")
    found = load_foreign_cam(tmp_path / "a.npy")
    assert torch.equal(found.cam, file.cam) and torch.equal(found.class_ids, file.class_ids)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_code_inside_a_tensors_storage_does_not_run(tmp_path):
    class Hidden:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Evil()),)

    for content in ({0: Evil()}, {0: Hidden()}):
        np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"a\.npy is not a \.npy dictionary"):
            load_foreign_cam(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("keys", "maps", "message"),
    [
        ([2], np.zeros((2, 6, 8)), "1 classes, but maps are"),
        ([-3], np.zeros((1, 6, 8)), "not different numbers from 0"),
        ([2], np.full((1, 6, 8), 6.98), "up to 6.98"),
    ],
)
def test_maps_that_cannot_be_cams_are_refused(tmp_path, keys, maps, message):
    content = {"keys": np.array(keys), "cam": maps[:, ::4, ::4], "high_res": maps}
    np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"a.npy is not a CAM file.*{message}"):
        load_foreign_cam(tmp_path / "a.npy")


def save_psa(path, classes=(3, 15)):
    """As the authors' programs write CAMs; returns these."""
    file = cams(classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, {int(k) - 1: cam.numpy() for k, cam in zip(file.class_ids, file.cam)}, allow_pickle=True)
    return file


def test_crf_scores_of_psa_and_seam_are_not_taken_for_cams(tmp_path):
    """{0: background, k: class k} would be CAMs of the classes 1 and k + 1."""
    scores = torch.randn(3, 6, 8).softmax(0).numpy()
    np.save(tmp_path / "a.npy", dict(zip((0, 3, 15), scores)), allow_pickle=True)
    with pytest.raises(ValueError, match="not CAMs"):
        load_foreign_cam(tmp_path / "a.npy")


def test_folder_is_converted_once_and_files_without_classes_are_left_out(tmp_path, capsys):
    theirs, out = tmp_path / "theirs", tmp_path / "ours"
    save_psa(theirs / "a.npy")
    expected = save_psa(theirs / "part/b.npy")
    save_psa(theirs / "c.npy", ())
    with pytest.raises(NoClassError, match=r"c\.npy"):
        load_foreign_cam(theirs / "c.npy")
    options = {"input": str(theirs), "out": str(out)}
    call(exchange_cams, options)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.npz")} == {"a.npz", "part/b.npz"}
    assert torch.equal(load_cam(out / "part/b.npz").cam, expected.cam)
    printed = capsys.readouterr().out
    assert "(2 files)" in printed and "skipped  1 files" in printed
    kept = (out / "a.npz").stat().st_mtime_ns
    assert call(exchange_cams, options) == out and (out / "a.npz").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="other settings"):
        call(exchange_cams, {**options, "input": str(theirs / "part")})
    with pytest.raises(FileNotFoundError, match=r"no \.npy files"):
        call(exchange_cams, {**options, "input": str(out)})
