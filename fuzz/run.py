#!/usr/bin/env python3
"""Runs the fuzz targets, each until it finds no new coverage, and adds what they find to the corpus.

Builds with the agent's own toolchain: the instrumentation is a pass of the compiler, and needs no nightly. The C++ part of libFuzzer
needs a C++ compiler. The last lines are a table of executions and coverage. The exit code is 1 if a target fails; the failing input is
then in target/fuzz/artifacts.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
BUILT = HERE.parent / "target" / "fuzz"
ARTIFACTS = BUILT / "artifacts"
TARGETS = sorted(path.stem for path in (HERE / "fuzz_targets").glob("*.rs"))
INSTRUMENTED = " ".join(
    ["-Cpasses=sancov-module"]
    + [
        f"-Cllvm-args={option}"
        for option in (
            "-sanitizer-coverage-level=4",
            "-sanitizer-coverage-inline-8bit-counters",
            "-sanitizer-coverage-pc-table",
            "-sanitizer-coverage-trace-compares",
            "-simplifycfg-branch-fold-threshold=0",
        )
    ]
)
STATUS = re.compile(r"^#(\d+)\s+(\w+)\s+cov: (\d+)")


def host():
    """The target triple of this machine. With an explicit target, build scripts are not instrumented."""
    lines = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout.splitlines()
    return next(line.removeprefix("host: ") for line in lines if line.startswith("host: "))


def build():
    triple = host()
    command = ["cargo", "build", "--locked", "--release", "--manifest-path", str(HERE / "Cargo.toml"), "--target", triple]
    subprocess.run([*command, "--target-dir", str(BUILT)], check=True, env=os.environ | {"RUSTFLAGS": INSTRUMENTED})
    return BUILT / triple / "release"


def merge(program, target, found):
    """Replaces the found inputs of the corpus by a minimal set. Inputs with a name, written by hand, stay."""
    corpus = HERE / "corpus" / target
    named = [path for path in corpus.iterdir() if not re.fullmatch(r"[0-9a-f]{40}", path.name)]
    with tempfile.TemporaryDirectory() as scratch:
        least = pathlib.Path(scratch) / "least"
        least.mkdir()
        for path in named:
            shutil.copy(path, least)
        # By edges alone: inputs that differ in the number of passes would be thousands of files.
        command = [program, "-set_cover_merge=1", "-use_counters=0", str(least), str(corpus), str(found)]
        subprocess.run(command, check=True, capture_output=True)
        for path in corpus.iterdir():
            if path not in named:
                path.unlink()
        for path in least.iterdir():
            if not (corpus / path.name).exists():
                shutil.copy(path, corpus)


class Progress:
    """What libFuzzer reports on its standard error."""

    def __init__(self, stream):
        self.executions = self.first = self.edges = 0
        self.grown = time.monotonic()
        self.tail = collections.deque(maxlen=40)
        self.reader = threading.Thread(target=self.read, args=(stream,))
        self.reader.start()

    def read(self, stream):
        for line in stream:
            self.tail.append(line)
            if done := re.match(r"stat::number_of_executed_units: (\d+)", line):
                self.executions = int(done[1])
            if status := STATUS.match(line):
                self.executions, edges = int(status[1]), int(status[3])
                self.first = self.first or edges
                if edges > self.edges:
                    self.edges, self.grown = edges, time.monotonic()


def run(program, target, idle, least_cpu):
    """Fuzzes until there was no new coverage for `idle` seconds, and for `least_cpu` seconds of CPU time."""
    artifacts = ARTIFACTS / target
    artifacts.mkdir(parents=True, exist_ok=True)
    found = pathlib.Path(tempfile.mkdtemp())
    dictionary = HERE / "dictionaries" / f"{target}.dict"
    command = [program, str(found), str(HERE / "corpus" / target), "-max_len=16384", "-timeout=25", "-print_final_stats=1"]
    command += [f"-artifact_prefix={artifacts}/"]
    command += [f"-dict={dictionary}"] if dictionary.exists() else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, errors="replace")
    progress = Progress(process.stderr)
    failed = False
    while time.monotonic() - progress.grown <= idle or cpu_seconds(process.pid) <= least_cpu:
        if failed := process.poll() is not None:
            break
        time.sleep(1)
    # libFuzzer prints its totals and ends.
    process.send_signal(signal.SIGINT)
    process.wait()
    progress.reader.join()
    if not failed:
        merge(program, target, found)
    shutil.rmtree(found)
    return target, progress, failed


def cpu_seconds(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="default: all", metavar="target")
    parser.add_argument("--idle", type=int, default=600, help="seconds without new coverage after which a target ends")
    parser.add_argument("--cpu", type=int, default=600, help="least seconds of CPU time for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at the same time")
    arguments = parser.parse_args()
    targets = arguments.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    programs = build()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda target: run(programs / target, target, arguments.idle, arguments.cpu), targets))
    print("| target | executions | edges of the corpus | edges at the end |\n|---|---|---|---|")
    for target, progress, _ in results:
        print(f"| `{target}` | {progress.executions} | {progress.first} | {progress.edges} |")
    for target, progress, failed in results:
        if failed:
            sys.stderr.write(f"{target} failed; the input is in {ARTIFACTS / target}:\n{''.join(progress.tail)}")
    sys.exit(any(failed for *_, failed in results))


if __name__ == "__main__":
    main()
