"""Score files: which records replace each other."""

from engine.scores.records import read_scores, write_scores


def record(miou, **made_by):
    return {"protocol": "seg/val/ss", "score": {"miou": miou}, "settings": {}, "provenance": made_by}


def scores_of(folder):
    return [record["score"]["miou"] for record in read_scores(folder)]


def test_only_the_same_checkpoint_replaces_its_score(tmp_path):
    for miou, digest in ((0.1, "a"), (0.2, "b"), (0.3, "a")):
        write_scores(tmp_path, [record(miou, checkpoint_sha256=digest, step=5)])
    assert scores_of(tmp_path) == [0.2, 0.3]
    write_scores(tmp_path, [record(0.4, checkpoint_sha256="b", step=5) | {"protocol": "seg/val/ss+flip"}])
    assert scores_of(tmp_path) == [0.2, 0.3, 0.4]


def test_a_training_keeps_one_score_of_each_step(tmp_path):
    for miou, step in ((0.1, 5), (0.2, 10), (0.3, 10)):  # step 10 twice: the run was killed after it
        write_scores(tmp_path, [record(miou, step=step)])
    assert scores_of(tmp_path) == [0.1, 0.3]
