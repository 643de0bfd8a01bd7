"""The container and the cluster files: what they name is there, and what they promise is said in them."""

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from maskgit.apps.cli.commands import main
from maskgit.apps.ray_serve import Options, build
from maskgit.apps.serving.app import bare_app
from maskgit.apps.serving.middleware import OPEN_PATHS
from maskgit.apps.serving.service import Limits

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, each on one line."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], " ".join(line.partition(" ")[2].split())) for line in lines]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def objects(name: str) -> dict[str, dict]:
    """Return the objects of a Kubernetes file by their kinds."""
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / name).read_text("utf-8"))}


@pytest.fixture
def flags(capsys) -> set[str]:
    """The flags of `maskgit serve`."""
    assert main(["serve", "--help"]) == 0
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def used(args: list[str]) -> set[str]:
    return {arg.partition("=")[0] for arg in args if arg.startswith("--")}


def test_the_dockerfile_copies_what_is_there_and_nothing_else():
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    copied = {source for sources in copied for source in sources}
    assert copied == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"}
    assert all((ROOT / source).exists() for source in copied)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[1] == "*"
    assert admitted == copied


def test_the_package_needs_nothing_else_to_be_built():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    named = re.findall(r'^readme = "(.*)"|^license-files = \["(.*)"\]', text, re.MULTILINE)
    assert {first or second for first, second in named} == {"README.md", "LICENSE"}
    extras = re.search(r"^ray = ", text, re.MULTILINE), re.search(r"^serve = ", text, re.MULTILINE)
    assert all(extras)


def test_the_container_runs_a_command_that_exists(flags):
    command = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    assert command[:2] == ["maskgit", "serve"]
    assert used(command) <= flags
    assert command[command.index("--port") + 1] == last("EXPOSE")


def test_the_container_is_no_root_and_downloads_nothing_when_it_runs():
    order = [name for name, _ in instructions()]
    assert order.index("USER") < order.index("ENTRYPOINT")
    assert int(last("USER").partition(":")[0]) > 0
    stage = instructions()[len(order) - order[::-1].index("FROM") :]
    assert not [rest for name, rest in stage if name == "RUN" and re.search(r"pip|apt|curl|wget", rest)]
    assert "HF_HUB_OFFLINE=1" in last("ENV")


def test_the_health_check_is_a_program_that_asks_an_open_path():
    check = last("HEALTHCHECK")
    (program,) = json.loads(check[check.index("[") :])[2:]
    compile(program, "Dockerfile", "exec")
    asked = re.search(rf"127\.0\.0\.1:{last('EXPOSE')}(/\w+)", program)[1]
    assert asked in OPEN_PATHS


def test_kubernetes_keeps_the_pod_small_and_closed(flags):
    found = objects("kubernetes.yaml")
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][0] == "serve"
    assert used(container["args"]) <= flags
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == last("USER")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    assert set(container["resources"]) == {"requests", "limits"}


def test_kubernetes_reaches_the_server():
    found = objects("kubernetes.yaml")
    template = found["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    assert "--host=0.0.0.0" in container["args"]
    paths = bare_app().openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == port["name"]
        assert asked["path"] in paths
        # A probe has no key.
        assert asked["path"] in OPEN_PATHS
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    labels = template["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert [one["targetPort"] for one in found["Service"]["spec"]["ports"]] == [port["name"]]


def test_kubernetes_gives_the_keys_and_the_time_to_end():
    pod = objects("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = dict(arg.removeprefix("--").split("=") for arg in container["args"] if "=" in arg)
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    secret = volumes["keys"]["secret"]
    # The command at the head of the file makes that secret.
    made = (DEPLOY / "kubernetes.yaml").read_text("utf-8")
    file = re.search(rf"create secret generic {secret['secretName']} --from-file=(\S+)", made)[1]
    assert given["api-key-file"] == f"{mounts['keys']}/{file}"
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause + float(given["timeout"])
    Limits(queue_size=int(given["queue-size"]), timeout=float(given["timeout"]))


def test_rays_file_is_one_that_ray_takes():
    schema = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text("utf-8")))
    (application,) = schema.applications
    module, name = application.import_path.split(":")
    assert (module, name) == (build.__module__, build.__name__)
    build(Options.model_validate(application.args))


def test_the_document_names_build_arguments_and_files_that_exist():
    text = (ROOT / "docs" / "serving.md").read_text("utf-8") + (ROOT / "Dockerfile").read_text("utf-8")
    arguments = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= arguments
    for file in re.findall(r"deploy/[\w.-]+", text):
        assert (ROOT / file).is_file()


def test_the_documents_container_commands_use_flags_that_exist(flags):
    text = (ROOT / "docs" / "serving.md").read_text("utf-8").replace("\\\n", " ")
    commands = [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("docker run")
    ]
    assert len(commands) == 2
    for command in commands:
        image = next(number for number, word in enumerate(command) if fnmatch(word, "maskgit*"))
        assert used(command[image + 1 :]) <= flags
