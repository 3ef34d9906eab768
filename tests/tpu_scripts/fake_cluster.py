"""The scripts in a checkout of their own, with fakes of the services' programs first on the path."""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("gcloud", "kubectl", "sbatch", "scancel", "squeue", "sacct", "sinfo", "srun", "uv")
VERBS = ("create", "delete", "ssh", "scp", "apply", "cp", "logs")
SETTINGS = {
    "PROJECT": "a-project",
    "ZONE": "us-west4-a",
    "BUCKET_PATH": "gs://a-bucket/runs",
    "GKE_CLUSTER": "a-cluster",
    "GKE_LOCATION": "us-west4",
    "SLURM_PARTITION": "gpus",
    "POLL_SECONDS": "0",
    "NAME": "a-run",
}


@dataclass(frozen=True)
class Reply:
    """What a fake answers."""

    out: str = ""
    err: str = ""
    code: int = 0


NOT_FOUND = Reply(err="ERROR: (gcloud) NOT_FOUND: the resource was not found\n", code=1)
NO_JOBSET = Reply(err='Error from server (NotFound): jobsets "a-run" not found\n', code=1)


@dataclass
class Cluster:
    """A checkout with settings, and what its fakes are to answer and were asked."""

    folder: Path
    settings: dict = field(default_factory=lambda: dict(SETTINGS))

    @property
    def scripts(self) -> Path:
        return self.folder / "check out" / "tpu_scripts"

    def answers(self, pattern, *replies):
        """What the fakes say to a command with `pattern` in it, the last from then on."""
        rules = self.folder / "fakes" / "rules"
        rule = rules / f"{len(list(rules.iterdir())):02}"
        rule.mkdir()
        (rule / "pattern").write_text(pattern)
        (rule / "next").write_text("0")
        for number, reply in enumerate(replies):
            reply = reply if isinstance(reply, Reply) else Reply(out=f"{reply}\n")
            (rule / f"{number}.out").write_text(reply.out)
            (rule / f"{number}.err").write_text(reply.err)
            (rule / f"{number}.code").write_text(str(reply.code))

    def __call__(self, command, *options, environment=None, **how):
        """Run one of the scripts: the finished process."""
        lines = [f"{name}={value}" for name, value in self.settings.items()]
        file = self.folder / "my settings.sh"
        file.write_text("\n".join([(self.scripts / "settings.sh").read_text(), *lines]))
        # Whatever started the tests may have had interrupts ignored, and bash cannot trap those.
        heard = ["env", "--default-signal=INT"]
        return subprocess.run(
            [*heard, self.scripts / f"{command}.sh", "--settings", file, *options],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            **({"stdin": subprocess.DEVNULL} | how),
        )

    @property
    def environment(self):
        fakes = self.folder / "fakes"
        return {
            "PATH": f"{fakes / 'bin'}:/usr/bin:/bin",
            "FAKES": str(fakes),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder),
        }

    @property
    def calls(self):
        """The words of each call of a fake, in order."""
        file = self.folder / "fakes" / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def done(self):
        """The same in a word each, without what only asks."""
        return [word for call in self.calls if (word := _short(call))]

    @property
    def launch(self) -> Path:
        return self.scripts.parent / "outputs" / "clusters" / self.settings["NAME"] / "peftjax-launch"

    def job(self, name):
        """The words of an array of the launched job, as bash reads it."""
        code = f'. {shlex.quote(str(self.launch / "job.sh"))}; printf "%s\\0" "${{{name}[@]}}"'
        return subprocess.check_output(["bash", "-c", code], text=True).split("\0")[:-1]


def _short(call):
    if any(word.endswith("worker.sh state") for word in call):
        return None
    if call[0] in ("gcloud", "kubectl"):
        verb = next((word for word in call if word in VERBS), None)
        part = [word.split()[-1] for word in call if verb == "ssh" and word.startswith("--command=")]
        return " ".join([verb, *part]) if verb else None
    return call[0] if call[0] in ("sbatch", "scancel", "uv") else None


def make_cluster(folder: Path) -> Cluster:
    """A cluster in an empty folder; the checkout's path has a space in it."""
    made = Cluster(folder)
    shutil.copytree(ROOT / "tpu_scripts", made.scripts)
    checkout = made.scripts.parent
    (checkout / "peftjax").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "peftjax/code.py"):
        (checkout / name).write_text(name)
    for below in ("fakes/rules", "fakes/bin", "home"):
        (folder / below).mkdir(parents=True)
    for tool in TOOLS:
        os.symlink(Path(__file__).parent / "fake_tool.sh", folder / "fakes" / "bin" / tool)
    made.settings["SLURM_DIR"] = shlex.quote(str(folder / "shared disk"))
    return made
