"""The table of the project's goals, filled from MLflow runs."""

import shutil

import pytest

from tasks import goals
from tasks.runtime import atomic, tracking

SAMPLERS = """\
sampler,steps,guidance_scale,n,seed_blocks,frechet_distance,kid,cmmd,inception_style_score,clip_score,label_accuracy,note
dpm_solver_pp_2m,20,1.0,512,3,{distance},0.01,{cmmd},,81.2,,
ddim,50,1.0,256,1,1.5,0.01,0.4,,80.0,,
ddpm,1000,1.0,32,1,,,,,79.5,,too few images for distances (128 needed)
"""


@pytest.fixture
def evaluated(tmp_path, migrated_database, monkeypatch):
    """Returns a function that creates an evaluation run in a separate MLflow, as `register` does."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    client = tracking.connect()

    def call(
        key,
        distance,
        size=16,
        space="pixels",
        conditioning="label",
        fingerprint="f" * 64,
        end=True,
        floor="eval/frechet_distance_floor",
        headline=None,
        cmmd=0.5,
    ):
        run = tracking.find_or_create_run(
            client,
            tracking.EVALUATION_KEY,
            key,
            kind="evaluation",
            params={
                "fingerprint": fingerprint,
                "space": space,
                "conditioning": conditioning,
                "measurement.image.size": size,
                "measurement.extractor": "classifier",
                **({"headline": headline} if headline else {}),  # runs of earlier versions have none
            },
            dataset={"name": "pets", "digest": "e" * 64},
        )
        client.log_batch(run.info.run_id, metrics=tracking.points(0, {floor: 0.38}))
        (tmp_path / "samplers.csv").write_text(SAMPLERS.format(distance=distance, cmmd=cmmd))
        client.log_artifact(run.info.run_id, str(tmp_path / "samplers.csv"), "evaluation")
        timing = {
            "seconds_per_image": {"dpm_solver_pp_2m, 20 steps, guidance 1": 0.024, "ddim, 50 steps, guidance 1": 3}
        }
        atomic.write_json(tmp_path / "evaluate.json", timing)
        client.log_artifact(run.info.run_id, str(tmp_path / "evaluate.json"))
        if end:
            client.set_terminated(run.info.run_id, "FINISHED")
        return client

    return call


def by_goal(client):
    rows = goals.goals(client)
    assert [row["goal"] for row in rows] == sorted(
        (row["goal"] for row in rows), key=[g.name for g in goals.GOALS].index
    )
    return {row["goal"].split(",")[0]: row for row in rows}


def test_without_runs_every_goal_has_a_row_without_numbers(tmp_path, evaluated):
    rows = goals.goals(tracking.connect())
    assert [row["note"] for row in rows] == ["no run yet"] * 4
    assert goals.markdown(rows).count("| – |") >= 4


def test_pixels_fill_the_first_two_rows(evaluated):
    rows = by_goal(evaluated("a", 2.0))
    assert rows["DDIM"] == {
        "goal": "DDIM, 50 steps",
        "data": "pets",
        "resolution": "16",
        "distance": "1.5",
        "measure": "FID",
        "floor": "0.38",
        "clip_score": "80",
        "steps": "50",
        "seconds": "3",
        "guidance": "1.0",
        "n": "256",
        "features": "classifier",
        "fingerprint": "ffffffff",
        "note": "",
    }
    assert (rows["DDPM"]["distance"], rows["DDPM"]["clip_score"]) == ("", "79.5")
    assert "too few images" in rows["DDPM"]["note"]
    assert rows["Latent diffusion"]["note"] == rows["Stable Diffusion class"]["note"] == "no run yet"


def test_a_row_names_autoguidance(evaluated, monkeypatch):
    table = "sampler,steps,guidance_scale,guidance,n,seed_blocks,frechet_distance,clip_score,note\n"
    monkeypatch.setitem(globals(), "SAMPLERS", table + "ddim,50,1.5,auto,256,1,{distance},80.0,\n")
    client = evaluated("a", 1.25)
    assert (by_goal(client)["DDIM"]["distance"], by_goal(client)["DDIM"]["guidance"]) == ("1.25", "1.5, auto")


def test_runs_of_an_earlier_version_keep_their_floor(evaluated):
    assert by_goal(evaluated("a", 2.0, floor="frechet_distance_floor"))["DDIM"]["floor"] == "0.38"


def test_latents_and_large_text_to_image_fill_the_others_with_the_best_run(evaluated):
    evaluated("a", 7.0, size=64, space="latents")
    evaluated("b", 5.0, size=64, space="latents", conditioning="text")
    evaluated("c", 1.0, size=64, space="latents", end=False)
    client = evaluated("d", 9.0, size=512, space="latents", conditioning="text", fingerprint="0" * 64)
    rows = by_goal(client)
    assert (rows["Latent diffusion"]["distance"], rows["Latent diffusion"]["seconds"]) == ("5", "0.024")
    assert rows["Latent diffusion"]["n"] == "3 x 512"
    assert (rows["Stable Diffusion class"]["distance"], rows["Stable Diffusion class"]["resolution"]) == ("9", "512")
    assert rows["DDIM"]["note"] == "no run yet"


def test_the_teacher_of_a_consistency_model_fills_no_row(evaluated, monkeypatch):
    header, first, *others = SAMPLERS.splitlines()
    teacher = ",teacher,".join(others[0].split(",", 1))
    text = "\n".join([header.replace("sampler,", "sampler,weights,"), first.replace(",", ",,", 1), teacher])
    monkeypatch.setitem(globals(), "SAMPLERS", text + "\n")
    client = evaluated("one", 0.7)
    assert by_goal(client)["DDIM"]["note"] == "no run yet"


def test_numbers_measured_differently_have_separate_rows(evaluated):
    evaluated("a", 7.0, space="latents")
    client = evaluated("b", 5.0, space="latents", fingerprint="0" * 64)
    assert [row["distance"] for row in goals.goals(client) if row["goal"].startswith("Latent")] == ["5", "7"]


def test_the_best_run_is_that_of_its_own_headline(evaluated):
    evaluated("a", 3.0, space="latents", headline="cmmd", floor="eval/cmmd_floor", cmmd=0.9)
    evaluated("b", 9.0, space="latents", headline="cmmd", floor="eval/cmmd_floor", cmmd=0.2)
    client = evaluated("c", 7.0, space="latents", headline="frechet_distance")
    rows = [row for row in goals.goals(client) if row["goal"].startswith("Latent")]
    assert [(row["measure"], row["distance"], row["floor"]) for row in rows] == [
        ("CMMD", "0.2", "0.38"),
        ("FID", "7", "0.38"),
    ]
