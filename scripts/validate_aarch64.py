"""The device part on another processor: install, validate and measure a bundle on an emulated aarch64 device.

    scripts/validate_aarch64 BUNDLE [--memory 512] [--cpu cortex-a76] [--prompt 16] [--new 8]

QEMU emulates a whole machine of one core (its user mode crashes when onnxruntime is imported). It boots
Debian's arm64 kernel on a disk that is made here, as any user: Debian's Python unpacked from its packages,
wheels for aarch64 from the package index, vera-edge's own, and BUNDLE. What the device says comes over its
serial console to the standard output; the exit code is that of the first of its commands that failed.

Needs qemu-system-aarch64, apt-get, dpkg-deb, tar and mke2fs, Debian's mirror and the package index. Downloads
are kept in $VERA_EDGE_CACHE/aarch64. Emulation is slow, so CI doesn't run it.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.prepare_demo import ROOT, cache_folder
from vera_edge.bundle import contents as bundle
from vera_edge.errors import OutputError, VeraEdgeError

NEEDED = {
    "qemu-system-aarch64": "qemu-system-arm",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "mke2fs": "e2fsprogs",
}
RELEASE, KERNEL, PYTHON = "bookworm", "linux-image-cloud-arm64", "3.11"
PACKAGES = (KERNEL, "busybox-static", "libstdc++6", "python3")
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
GLIBC = 36  # the release's is 2.36; wheels of any older manylinux run
DONE = "the device is done: "  # what its last line begins with
# The kernel starts this as its first process, with nothing mounted and no daemon beside it.
INIT = """#!/bin/busybox sh
export PATH=/usr/bin:/usr/sbin PYTHONPATH=/edge/lib HOME=/edge COLUMNS=110
set -o pipefail
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs tmp /tmp
cd /edge
vera_edge() {{
  echo; echo "$ vera-edge $*"
  python3 -m vera_edge "$@" 2>&1 | busybox cat || stop $?
}}
stop() {{
  echo; echo "{done}$1"
  busybox poweroff -f
}}
echo "$ uname -a; free -m"; busybox uname -a; busybox free -m
{commands}
stop 0
"""
# Draws A and B anew; the digest is that of their values.
DIGEST = """
from pathlib import Path
from vera_edge.bundle import contents as bundle
from vera_edge.device import projections
print(projections.draw(bundle.read(Path("bundle"))).digest)
"""


def main() -> int:
    """Prepare the disk, boot the device, and pass on what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--memory", type=int, default=512, help="the device's, in MiB")
    parser.add_argument("--cpu", default="cortex-a76", help="as qemu-system-aarch64 -cpu help lists them")
    parser.add_argument("--prompt", type=int, default=16, help="tokens that bench feeds")
    parser.add_argument("--new", type=int, default=8, help="tokens that bench generates")
    options = parser.parse_args()
    try:
        check_tools()
        manifest = bundle.verify(options.bundle)
        cache = cache_folder() / "aarch64"
        debs, wheels = fetch_debian(cache), fetch_wheels(cache)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            commands = device_commands(manifest, options.prompt, options.new)
            kernel = make_root(Path(folder) / "root", debs, wheels, options.bundle, commands)
            disk = make_disk(Path(folder), 2 * manifest.size + (256 << 20))
            return boot(kernel, disk, options.cpu, options.memory)
    except VeraEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def device_commands(manifest: bundle.Manifest, prompt: int, new: int) -> str:
    """What the device does, as shell lines."""
    words = [
        ["verify", "bundle"],
        ["install", "bundle", "models", "-q"],
        ["validate", "models/current", "--max-memory", "400MB", "-q"],
        ["bench", "models/current", "--rounds", "2", "--prompt", str(prompt), "--new", str(new), "-q"],
    ]
    lines = [f"vera_edge {shlex.join(line)}" for line in words]
    if manifest.projection is not None and manifest.generated:
        drawn = f'echo; echo "projections drawn here:"; python3 -c {shlex.quote(DIGEST)} || stop 2'
        lines.insert(2, drawn)
    return "\n".join(lines)


def check_tools() -> None:
    """Raises OutputError naming the Debian packages of the programs that are missing."""
    missing = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
    if missing:
        raise OutputError(f"programs are missing; install them: apt-get install {' '.join(missing)}")
    if not Path(KEYRING).is_file():
        raise OutputError(f"{KEYRING} is missing; install it: apt-get install debian-archive-keyring")


def fetch_debian(cache: Path) -> list[Path]:
    """The arm64 packages that PACKAGES need, by apt with a root, a list and a cache of its own."""
    apt = cache / "debian"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [arch=arm64 signed-by={KEYRING}] {MIRROR} {RELEASE} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "true",
        "Dir::Cache": str(apt),
        "Dir::Cache::archives": str(apt / "archives"),
        "Dir::Etc::SourceList": str(apt / "sources.list"),
        "Dir::Etc::SourceParts": "/nonexistent",
        "Dir::State::Lists": str(apt / "lists"),
        "Dir::State::status": str(apt / "status"),
    }
    command = [
        "apt-get",
        "-qq",
        *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
    ]
    run([*command, "update"])
    run([*command, "install", "--download-only", "-y", *PACKAGES])
    run([*command, "autoclean"])  # what an earlier run left of packages that are newer now
    return sorted((apt / "archives").glob("*.deb"))


def fetch_wheels(cache: Path) -> Path:
    """A folder with vera-edge and what it needs, unpacked from wheels for aarch64."""
    target, built = cache / "lib", cache / "wheel"
    for folder in (target, built):
        shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "wheel", "--no-deps", "-w", str(built), str(ROOT)])
    (wheel,) = built.glob("*.whl")
    tags = [f"manylinux_2_{minor}_aarch64" for minor in range(GLIBC, 16, -1)]
    only = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    only += [word for tag in tags for word in ("--platform", tag)]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run([*pip, "install", "--target", str(target), "--no-compile", *only, *constraints, str(wheel)])
    return target


def make_root(root: Path, debs: Sequence[Path], wheels: Path, source: Path, commands: str) -> Path:
    """Fill `root` with the device's files; returns the kernel, which stays outside of it."""
    for folder in ("bin", "lib", "sbin"):
        (root / "usr" / folder).mkdir(parents=True)
        (root / folder).symlink_to(f"usr/{folder}")
    for folder in ("proc", "sys", "dev", "tmp", "edge"):
        (root / folder).mkdir()
    kernel = root.parent / "kernel"
    for deb in debs:
        if not deb.name.startswith("linux-image-"):
            unpack(deb, root)
        elif not deb.name.startswith(KERNEL):  # the one that KERNEL asks for, under its full name
            unpack(deb, kernel, "./boot")
    shutil.copytree(wheels, root / "edge" / "lib")
    shutil.copytree(source, root / "edge" / "bundle")
    init = root / "edge" / "init"
    init.write_text(INIT.format(done=DONE, commands=commands))
    init.chmod(0o755)
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    return image


def unpack(deb: Path, folder: Path, *members: str) -> None:
    """What dpkg unpacks, with the links for /bin, /lib and /sbin kept as they are."""
    folder.mkdir(exist_ok=True)
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as source:
        command = ["tar", "-x", "--no-same-owner", "--keep-directory-symlink", "-C", str(folder), *members]
        done = subprocess.run(command, stdin=source.stdout, capture_output=True, text=True, check=False)
    if done.returncode or source.returncode:
        raise OutputError(f"{deb} can't be unpacked ({done.stderr.strip()}); delete it and try again")


def make_disk(folder: Path, free: int) -> Path:
    """An ext4 image of `folder`/root with at least `free` bytes to spare."""
    disk = folder / "disk"
    files = (path.lstat().st_size + 4096 for path in (folder / "root").rglob("*"))
    kilobytes = (int(1.1 * sum(files)) + free) // 1024
    run(["mke2fs", "-q", "-t", "ext4", "-d", str(folder / "root"), str(disk), f"{kilobytes}k"])
    return disk


def boot(kernel: Path, disk: Path, cpu: str, memory: int) -> int:
    """Run the device and print what its console says; returns the exit code it tells."""
    command = ["qemu-system-aarch64", "-machine", "virt", "-cpu", cpu, "-smp", "1", "-m", str(memory)]
    command += ["-nographic", "-no-reboot", "-nic", "none", "-kernel", str(kernel)]
    command += ["-append", "console=ttyAMA0 quiet nowatchdog panic=-1 root=/dev/nvme0n1 rw init=/edge/init"]
    command += ["-drive", f"file={disk},if=none,id=disk,format=raw,cache=unsafe"]
    command += ["-device", "nvme,serial=edge,drive=disk"]
    code = None
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        assert machine.stdout is not None
        for raw in machine.stdout:
            line = raw.decode(errors="replace").rstrip()
            print(line, flush=True)
            if found := re.fullmatch(re.escape(DONE) + r"(\d+)", line):
                code = int(found[1])
    if code is None:
        raise OutputError(f"the device stopped before it was done (qemu's exit code is {machine.returncode})")
    return code


def run(command: Sequence[str]) -> None:
    """Run a program quietly. Raises OutputError with the last line that it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"exit code {done.returncode}"
        raise OutputError(f"{Path(command[0]).name} fails: {reason}")


if __name__ == "__main__":
    sys.exit(main())
