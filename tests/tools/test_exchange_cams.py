"""CAM files of other repositories come and go unchanged, and none of them can run code."""

import pickle

import numpy as np
import pytest
import torch

from tests.stages import call
from tools import exchange_cams
from utils.cam_files import CamFile, load_cam, save_cam
from utils.exchange import NoClassError, load_foreign_cam, save_irn_cam, save_psa_cam
from utils.files import write_json


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_psa_dictionary_of_any_pickle_protocol_is_read(tmp_path, protocol):
    file = cams()
    content = {int(k) - 1: file.cam[i].numpy() for i, k in enumerate(file.class_ids)}
    with open(tmp_path / "a.npy", "wb") as out:
        array = np.array(content, dtype=object)
        np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, out, protocol=protocol)
    found = load_foreign_cam(tmp_path / "a.npy")
    assert torch.equal(found.cam, file.cam) and torch.equal(found.class_ids, file.class_ids)


@pytest.mark.parametrize("classes", [(3, 15), (1,), ()])
def test_written_files_are_those_of_the_other_programs(tmp_path, classes):
    file = cams(classes)
    save_irn_cam(tmp_path / "irn.npy", file)
    content = np.load(tmp_path / "irn.npy", allow_pickle=True).item()
    assert list(content) == ["keys", "cam", "high_res"]
    assert torch.equal(content["keys"], file.class_ids - 1) and torch.equal(content["cam"], file.strided)
    assert np.array_equal(content["high_res"], file.cam.numpy())
    save_psa_cam(tmp_path / "psa.npy", file)
    content = np.load(tmp_path / "psa.npy", allow_pickle=True).item()
    assert list(content) == [k - 1 for k in classes] and all(m.shape == (10, 13) for m in content.values())


def test_small_maps_are_written_at_image_size(tmp_path):
    small = CamFile(torch.tensor([1]), torch.full((1, 3, 4), 0.5), None, (10, 13))
    save_irn_cam(tmp_path / "irn.npy", small)
    content = np.load(tmp_path / "irn.npy", allow_pickle=True).item()
    assert content["high_res"].shape == (1, 10, 13) and content["cam"].shape == (1, 3, 4)
    np.testing.assert_allclose(content["high_res"], 0.5, rtol=1e-6)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_code_inside_a_tensors_storage_does_not_run(tmp_path):
    class Hidden:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Evil()),)

    for content in ({0: Evil()}, {0: Hidden()}):
        np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"a\.npy is no \.npy dictionary of arrays"):
            load_foreign_cam(tmp_path / "a.npy")


def test_dictionary_of_something_else_is_named(tmp_path):
    np.save(tmp_path / "c.npy", {"scores": np.zeros(3)})
    with pytest.raises(ValueError, match=r"c\.npy is no CAM file of IRN or PSA: its keys are scores"):
        load_foreign_cam(tmp_path / "c.npy")


@pytest.mark.parametrize(
    ("keys", "maps", "message"),
    [
        ([2], np.zeros((2, 6, 8)), "1 classes, but maps are"),
        ([2, 2], np.zeros((2, 6, 8)), "not different numbers from 0"),
        ([-3], np.zeros((1, 6, 8)), "not different numbers from 0"),
        ([2], np.full((1, 6, 8), np.nan), "no numbers"),
        ([2], np.full((1, 6, 8), 6.98), "up to 6.98"),
    ],
)
def test_maps_that_cannot_be_cams_are_refused(tmp_path, keys, maps, message):
    content = {"keys": np.array(keys), "cam": maps[:, ::4, ::4], "high_res": maps}
    np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=f"a.npy is no CAM file of IRN or PSA.*{message}"):
        load_foreign_cam(tmp_path / "a.npy")


def test_nearly_constant_map_of_seam_is_read(tmp_path):
    """SEAM takes the minimum twice from pixels at the minimum, which ends far below 0."""
    np.save(tmp_path / "a.npy", np.array({0: np.float32([[1, -101]])}, dtype=object), allow_pickle=True)
    assert load_foreign_cam(tmp_path / "a.npy").cam.tolist() == [[[1, -101]]]


@pytest.mark.parametrize("form", ["irn", "psa"])
def test_folder_goes_there_and_back(tmp_path, form):
    for name in ("a", "part/b"):
        save_cam(tmp_path / "ours" / f"{name}.npz", cams(), "float32")
    there = call(
        exchange_cams, {"input": str(tmp_path / "ours"), "out": str(tmp_path / "theirs"), "to": form}
    )
    back = call(
        exchange_cams,
        {"input": str(there), "out": str(tmp_path / "back"), "to": "tag2mask", "dtype": "float32"},
    )
    for name in ("a", "part/b"):
        file = load_cam(back / f"{name}.npz")
        assert torch.equal(file.cam, cams().cam) and torch.equal(file.class_ids, cams().class_ids)
    with pytest.raises(FileNotFoundError, match=r"no \.npy files"):
        call(exchange_cams, {"input": str(tmp_path / "ours"), "out": str(tmp_path / "x"), "to": "tag2mask"})


def test_files_without_classes_are_counted_and_left_out(tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    save_psa_cam(tmp_path / "theirs" / "a.npy", cams())
    for name in ("b", "c"):
        save_psa_cam(tmp_path / "theirs" / f"{name}.npy", cams(()))
    with pytest.raises(NoClassError, match=r"b\.npy holds no class"):
        load_foreign_cam(tmp_path / "theirs" / "b.npy")
    options = {"input": str(tmp_path / "theirs"), "out": str(tmp_path / "ours"), "to": "tag2mask"}
    out = call(exchange_cams, options)
    assert [path.name for path in out.glob("*.npz")] == ["a.npz"]
    printed = capsys.readouterr().out
    assert "(1 files)" in printed and "skipped  2 files that hold no class" in printed and "b.npy" in printed


def test_folder_of_other_files_or_settings_is_refused(tmp_path):
    save_cam(tmp_path / "ours" / "a.npz", cams(), "float32")
    options = {"input": str(tmp_path / "ours"), "out": str(tmp_path / "theirs"), "to": "irn"}
    out = call(exchange_cams, options)
    kept = (out / "a.npy").stat().st_mtime_ns
    assert call(exchange_cams, options) == out and (out / "a.npy").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="other settings .*to: irn -> psa"):
        call(exchange_cams, {**options, "to": "psa"})
    write_json(tmp_path / "ours" / "settings.json", {"checkpoint_sha256": "another"})
    with pytest.raises(ValueError, match="other settings .*input"):
        call(exchange_cams, options)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "b.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no run of this tool made, for example b\.npy"):
        call(exchange_cams, {**options, "out": str(tmp_path / "foreign")})
