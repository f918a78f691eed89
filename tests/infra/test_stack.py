"""The shared stack as files: Dockerfiles, compose.yaml and Kubernetes manifests, checked without a container engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows import deploy
from infra import buckets, mlflow_server
from tests.support import s3_site

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS, KUBERNETES = ROOT / "infra" / "containers", ROOT / "infra" / "kubernetes"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
POOLS = {name: ROOT / file for name, file in deploy.TEMPLATES.items() if file}
"""Type of a work pool -> the template of its jobs."""
REQUIRED = re.compile(r"\$\{\w+:\?[^}]+\}")
SECRET = re.compile(r"password|secret|access_key|auth_string|login", re.I)
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "restart", "healthcheck"],
    "properties": {
        "image": {"type": "string", "pattern": "^(afterimage(-cuda)?|[a-z0-9/]+:[0-9][0-9.]*(-[a-z]+)?)$"},
        "build": {"type": "object", "required": ["context", "dockerfile"]},
        "command": {"type": "array", "items": {"type": "string"}},
        "entrypoint": {"type": "array", "items": {"type": "string"}},
        "environment": {"type": "object", "additionalProperties": {"type": "string"}},
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^[\w./-]+:/[\w./-]+(:ro)?$"}},
        "restart": {"enum": ["unless-stopped", "on-failure"]},
        "healthcheck": {"type": "object", "anyOf": [{"required": ["test"]}, {"required": ["disable"]}]},
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["condition"],
                "properties": {"condition": {"enum": ["service_healthy", "service_completed_successfully"]}},
            },
        },
        "security_opt": {"const": ["no-new-privileges:true"]},
        "cap_drop": {"const": ["ALL"]},
        "stop_grace_period": {"type": "string"},
        "profiles": {"type": "array"},
        "shm_size": {"type": "string"},
        "deploy": {"type": "object"},
    },
}
"""The part of the Compose specification that compose.yaml may use, with the project's own rules."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def instructions(name: str) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "infra" / name).read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(first, rest) for first, rest in lines]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_come_from_the_lock_run_as_a_user_and_have_a_health_check(name):
    found = instructions(name)
    runs = [value for kind, value in found if kind == "RUN"]
    assert any("-r /tmp/requirements.lock" in value for value in runs)
    assert [value for kind, value in found if kind == "USER"][-1] == "1000"
    assert any(kind == "HEALTHCHECK" for kind, _ in found)
    assert not any("latest" in value for kind, value in found if kind == "FROM")
    for kind, value in found:
        if kind == "COPY" and "--from" not in value and "." not in value.split()[1:2]:
            for source in value.replace("--chown=afterimage", "").split()[:-1]:
                assert (ROOT / source).exists(), source


def test_the_image_for_gpus_has_a_compiler_and_the_tensorrt_of_the_project():
    text = (ROOT / "infra" / "Dockerfile.cuda").read_text(encoding="utf-8")
    assert "build-essential" in text and "python3.12-dev" in text
    program = re.search(r"sed -n '(s/.*/p)'", text)[1]
    command = ["sed", "-n", program, str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"tensorrt-cu\d+==[\d.]+\n", done.stdout)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_accepts(name):
    subprocess.run(["hadolint", str(ROOT / "infra" / name)], check=True)


def images(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `.ci/images` where `folder` has all programs but `dirname`."""
    (folder / "dirname").symlink_to(shutil.which("dirname") or "")
    command = [shutil.which("bash") or "", str(ROOT / ".ci" / "images"), *arguments]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def test_images_are_built_only_where_a_builder_runs(tmp_path):
    podman = tmp_path / "podman"
    podman.write_text("#!/bin/sh\nexit 1\n")  # installed, and its service does not run
    podman.chmod(0o755)
    done = images(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "images: skipped, because neither Docker nor Podman runs here\n"


@pytest.mark.parametrize(("kinds", "built"), [((), ["cpu", "cuda"]), (("cuda",), ["cuda"]), (("gpu",), [])])
def test_each_image_is_built_from_its_file_and_started(kinds, built, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = info ] || echo "docker $@"\n')
    docker.chmod(0o755)
    done = images(tmp_path, *kinds)
    called = [line for line in done.stdout.splitlines() if line.startswith("docker ")]
    tags = {"cpu": ("afterimage", "infra/Dockerfile"), "cuda": ("afterimage-cuda", "infra/Dockerfile.cuda")}
    wanted = []
    for tag, file in (tags[kind] for kind in built):
        assert (ROOT / file).is_file()
        wanted += [f"docker build --tag {tag} --file {file} .", f"docker run --rm {tag} python -m flows.dag"]
    assert called == wanted
    if not built:
        assert (done.returncode, done.stderr) == (1, "images: 'gpu' is neither cpu nor cuda\n")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["images"]["strategy"]["matrix"]["kind"] == list(tags)


def test_compose_has_only_known_keys_loopback_ports_and_pinned_images(compose):
    for name, service in compose["services"].items():
        try:
            jsonschema.validate(service, SERVICE)
        except jsonschema.ValidationError as error:
            raise AssertionError(f"{name}: {error.message}") from None
    named = {volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", [])}
    assert {name for name in named if "/" not in name} == set(compose["volumes"])
    for name in named:
        assert "/" not in name or (ROOT / name).is_file(), name
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_compose_has_no_secret_and_no_default_password(compose):
    wanted = set()
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) or ("://" in value and "@" in value):
                assert REQUIRED.search(value), f"{name}: {variable}"
            wanted |= set(re.findall(r"\$\{(\w+)", value))
    example = (CONTAINERS / "env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=$", example, re.M)) == wanted
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert "/.env" in ignored and ".env" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def test_commands_of_the_stack_exist(compose):
    """Options that the installed Prefect and our own commands do not know would end the servers at their start."""
    commands = {"mlflow": ["python", "-m", "infra.mlflow_server"], "worker": ["prefect", "worker", "start"]}
    for name, words in commands.items():
        command = compose["services"][name]["command"]
        assert command[: len(words)] == words
        call = [sys.executable, *(words[1:] if words[0] == "python" else ["-m", *words]), "--help"]
        text = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for option in re.findall(r"--[\w-]+", " ".join(command)):
            assert option in text, option


def test_mlflow_asks_for_a_login_in_containers_and_its_clients_have_it(compose):
    names = {mlflow_server.NAME, mlflow_server.PASSWORD}
    for service in ("mlflow", "worker", "worker-gpu", "deploy"):
        assert names <= compose["services"][service]["environment"].keys(), service
    for name, document, template in templates():
        for container in template["spec"]["containers"]:
            variables = {variable["name"] for variable in container.get("env", [])}
            if {"MLFLOW_TRACKING_URI", mlflow_server.DATABASE} & variables:
                assert names <= variables, (name, document["metadata"]["name"])


def test_prefect_knows_the_variables_of_the_stack(compose):
    variables = [
        name
        for service in compose["services"].values()
        for name in service.get("environment", {})
        if name.startswith("PREFECT_")
    ]
    program = "import sys, prefect.settings as known; [getattr(known, name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", program, *variables], check=True)


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            yield path.name, document


def templates() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, document in manifests():
        if "template" in document.get("spec", {}):
            yield name, document, document["spec"]["template"]


def test_remote_deployments_fetch_the_code_and_name_a_flow():
    document = deploy.compose(ROOT, "afterimage-kubernetes", "https://git.example.org/afterimage.git", "main")
    (step,) = document["pull"]
    repository = {"repository": "https://git.example.org/afterimage.git", "branch": "main"}
    assert step == {"prefect.deployments.steps.git_clone": repository}
    names = {deployment["name"] for deployment in document["deployments"]}
    assert names == {
        f"{name}-kubernetes" for name in ("nightly", "on-demand", "sweep", "champion-check", "data-refresh")
    }
    for deployment in document["deployments"]:
        file, _, flow = deployment["entrypoint"].partition(":")
        assert re.search(rf"^def {flow}\(", (ROOT / file).read_text(encoding="utf-8"), re.M)
        assert deployment["work_pool"] == {"name": "afterimage-kubernetes"}
        started = deployment.get("parameters", {}).get("pipeline", "afterimage/nightly-kubernetes")
        assert started.partition("/")[2] in names


@pytest.mark.parametrize("name", ["kubernetes", "docker"])
def test_prefect_accepts_the_pools_and_their_jobs_have_a_gpu_and_no_privileges(name):
    from prefect.server.schemas.actions import validate_base_job_template

    template = json.loads(POOLS[name].read_text(encoding="utf-8"))
    validate_base_job_template(template)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"]), "a variable that nothing uses"
    for values in template["variables"]["properties"].values():
        if "default" in values:
            jsonschema.validate(values["default"], values)
    if name == "docker":
        created = template["variables"]["properties"]["container_create_kwargs"]["default"]
        assert created["device_requests"][0]["Capabilities"] == [["gpu"]]
        assert (created["user"], created["cap_drop"]) == ("1000", ["ALL"])
        return
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    job = pod["containers"][0]
    assert job["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpus }}"
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert job["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_kustomization_lists_its_manifests():
    kustomization = dict(manifests())["kustomization.yaml"]
    listed = set(kustomization["resources"])
    assert listed == {name for name, _ in manifests()} - {"kustomization.yaml", "gpu-job.yaml"}
    for name in ("databases.sql", "storage.sh"):  # kustomize reads no file outside of its folder
        assert (KUBERNETES / name).read_text() == (CONTAINERS / name).read_text()
    generated = {entry["name"]: entry["files"] for entry in kustomization["configMapGenerator"]}
    assert generated == {"databases": ["databases.sql"], "storage": ["storage.sh"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which contains kustomize, is not installed")
def test_kustomize_builds_every_manifest_with_the_files_that_it_names():
    command = ["kubectl", "kustomize", str(KUBERNETES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    built = [document for document in yaml.safe_load_all(done.stdout) if document]
    sources = [one for name, one in manifests() if name not in ("kustomization.yaml", "gpu-job.yaml")]
    names, listed = (
        {(one["kind"], one["metadata"]["name"].partition("-")[0]) for one in documents}
        for documents in (built, sources)
    )
    assert names == listed | {("ConfigMap", "databases"), ("ConfigMap", "storage")}
    maps = {document["metadata"]["name"]: document["data"] for document in built if document["kind"] == "ConfigMap"}
    mounted = {
        volume["configMap"]["name"]
        for document in built
        if "template" in document.get("spec", {})
        for volume in document["spec"]["template"]["spec"].get("volumes", [])
        if "configMap" in volume
    }
    assert mounted <= set(maps), "a workload mounts a map whose name kustomize did not replace"


def test_workloads_are_restricted_limited_and_select_their_own_pods():
    services = {
        document["metadata"]["name"]: document["spec"]
        for _, document in manifests()
        if document.get("kind") == "Service"
    }
    names = set()
    for name, document, template in templates():
        spec, labels = template["spec"], template["metadata"]["labels"]
        names.add(document["metadata"]["name"])
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        if "selector" in document["spec"]:
            assert document["spec"]["selector"]["matchLabels"] == labels
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= set(container["resources"])
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for variable in container.get("env", []):
                if SECRET.search(variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "afterimage", variable
    assert set(services) <= names
    for name, spec in services.items():
        assert spec["selector"] == {"app": name}


@pytest.mark.skipif(importlib.util.find_spec("kubernetes_validate") is None, reason="needs the extra containers")
def test_manifests_follow_the_schemas_of_kubernetes():
    import kubernetes_validate

    checked = 0
    for _, document in manifests():
        if document.get("apiVersion", "").startswith("kustomize") or "kind" not in document:
            continue
        kubernetes_validate.validate(document, "1.34", strict=True)
        checked += 1
        if template := document["spec"].get("template") if "spec" in document else None:
            broken = json.loads(json.dumps(document))
            broken["spec"]["template"]["spec"]["containers"][0]["imagee"] = template["spec"]["containers"][0]["image"]
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(broken, "1.34", strict=True)
    assert checked >= 12


def test_the_nodes_of_a_job_agree_and_the_first_runs_the_stage_through_dvc(tmp_path):
    job = next(document for name, document in manifests() if document.get("kind") == "Job")
    listed = job["spec"]["template"]["spec"]["containers"][0]["env"]
    environment = {one["name"]: one["value"] for one in listed if "value" in one}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "accelerate").write_text('#!/bin/sh\ncat "$3"\necho "$@"\n')
    (fake / "python").write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then cat "$AFTERIMAGE_ACCELERATE"; echo "$@"; else {sys.executable} "$@"; fi\n'
    )
    for program in fake.iterdir():
        program.chmod(0o755)
    said = {}
    for rank in ("0", "1"):
        variables = {**os.environ, **environment, "JOB_COMPLETION_INDEX": rank, "TMPDIR": str(tmp_path)}
        variables["PATH"] = f"{fake}{os.pathsep}{os.environ['PATH']}"
        command = [str(CONTAINERS / "train-node.sh")]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
        *lines, said[rank] = done.stdout.strip().splitlines()
        settings = yaml.safe_load("\n".join(lines))
        assert (settings["num_processes"], settings["num_machines"]) == (8, 2)
        assert (settings["machine_rank"], settings["main_process_ip"]) == (int(rank), "training-0.training")
    assert said["0"] == "-m dvc repro --single-item train"
    assert said["1"].endswith(
        "-m tasks.train data/latents outputs/codec data/accepted.json outputs/prior "
        "outputs/pipeline outputs/averages reports/train"
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_accepts_the_scripts():
    scripts = [*CONTAINERS.glob("*.sh"), *KUBERNETES.glob("*.sh"), *(ROOT / ".ci").iterdir()]
    subprocess.run(["shellcheck", *map(str, scripts)], check=True)


def test_the_store_gets_one_identity_from_the_environment(tmp_path):
    (tmp_path / "weed").write_text("#!/bin/sh\ncat /tmp/s3.json\n".replace("/tmp", str(tmp_path)))
    (tmp_path / "weed").chmod(0o755)
    script = (CONTAINERS / "storage.sh").read_text().replace("/tmp/", f"{tmp_path}/")
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "word"}
    done = subprocess.run(["sh", "-c", script], env=variables, capture_output=True, text=True, check=True)
    (identity,) = json.loads(done.stdout)["identities"]
    assert identity["credentials"] == [{"accessKey": "key", "secretKey": "word"}]
    assert (tmp_path / "s3.json").stat().st_mode & 0o077 == 0
    del variables["S3_SECRET_KEY"]
    assert subprocess.run(["sh", "-c", script], env=variables, capture_output=True).returncode


def test_missing_buckets_are_created_once(monkeypatch, tmp_path, capsys):
    with s3_site.serving() as address:
        client = s3_site.client(address, monkeypatch, tmp_path)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        client.create_bucket(Bucket="dvc")
        buckets.create(["mlflow", "dvc"])
        assert capsys.readouterr().out == "buckets: created mlflow\n"
        buckets.create(["mlflow", "dvc"])
        assert capsys.readouterr().out == ""
        assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {"mlflow", "dvc"}
