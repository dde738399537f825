#!/usr/bin/env bash
# Run the core of the default suite (all but transformers and Triton) with several releases of
# torch, NumPy and Python, each in a virtual environment of its own:
#
#     tests/versions.sh                              # the default matrix below
#     tests/versions.sh 2.9.1/1.26.4/3.10 2.15.0     # torch[/NumPy[/Python]]
#     tests/versions.sh 2.11.0 -- tests/scheduler    # pytest arguments after --
#
# VENVS is where the environments lie and are found again (default: a temporary directory, removed
# at the end); PYTHON is the interpreter of entries that name none (default: python3). On Linux the
# index's wheels of torch are CUDA builds. Their CUDA libraries (gigabytes) are not installed:
# empty stand-ins, compiled with cc, satisfy the loader, and torch finds no GPU.
#
# Run in whole on Python 3.11: torch 2.9.1, 2.11.0 and 2.15.0, beside the pinned 2.13. Known
# to fail with 2.9.1: test_tensor_parallel.py[4], as torch 2.9 gathers the weights of an unevenly
# split layer beside fully_shard wrongly when the test reads them (all moments agree), and
# test_reduction.py[2], as its compiler cannot take a DistributedDataParallel in several graphs
# ('SymInt' object has no attribute 'item'). Run in whole with torch 2.15.0 and NumPy 2.5.5 on
# Python 3.13.0; known to fail there: test_tracer_compiled.py::test_a_part_compiled_after_attaching
# [none, embedding, raw], as edges of a part that was compiled later are not recognised (its inputs'
# roles stay open: not measured until a batch has another size), and
# test_wrap.py::test_nothing_of_ours_warns[True], as torch warns of that release of Python.
#
# Run in part, with no failure but those above: torch 2.9.1 and NumPy 1.26.4 on Python 3.10
# (tests/scheduler, tests/data, tests/test_wrap.py; tests/grad_sample without the tests that compile
# or start processes), and torch 2.13.0 and NumPy 2.5.5 on Python 3.12 (all but tests/grad_sample
# and tests/distributed).
set -uo pipefail
cd "$(dirname "$0")/.."

matrix=(2.9.1/1.26.4/3.10 2.9.1//3.12 2.11.0//3.11 2.13.0//3.12 2.15.0//3.13)
given=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do given+=("$1"); shift; done
[ ${#given[@]} -gt 0 ] && matrix=("${given[@]}")
if [ $# -gt 0 ]; then shift; fi
if [ $# -gt 0 ]; then
    suite=("$@")
else
    suite=(tests --ignore=tests/examples --ignore-glob='tests/kernels/*triton*'
        --ignore=tests/kernels/test_ahead_of_time.py
        --ignore=tests/grad_sample/test_models_transformers.py)
fi

if [ -z "${VENVS:-}" ]; then
    VENVS="$(mktemp -d)"
    trap 'rm -rf "$VENVS"' EXIT
fi
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# An empty constraints file replaces that of the machine's configuration, which may cap torch.
export PIP_CONSTRAINT="${PIP_CONSTRAINT:-/dev/null}"

find_python() {  # of version $1, such as 3.12
    local candidate
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        "$candidate" --version >/dev/null 2>&1 && echo "$candidate" && return
    done
    return 1
}

stand_in() {  # for the libraries that those in the directory $1 need and the loader cannot find
    local missing library
    missing="$(ldd "$1"/*.so* 2>/dev/null | awk '/not found/ {print $1}' | sort -u)"
    [ -z "$missing" ] && return
    # All symbols in every library, each with its version. 100 is cudaErrorNoDevice.
    nm -D --undefined-only "$1"/*.so* 2>/dev/null | awk '$1 == "U" {print $2}' |
        grep -E '^(__cuda|cu|nccl|nv)' | sort -u >"$1/symbols"
    awk -F@ '{print "long " $1 "(void) {return " (/^__cuda/ ? 0 : 100) ";}"}' \
        "$1/symbols" >"$1/stand_in.c"
    awk -F@ 'NF > 1 {of[$NF] = of[$NF] $1 "; "} END {for (v in of) print v " {" of[v] "};"}' \
        "$1/symbols" >"$1/stand_in.map"
    for library in $missing; do
        cc -shared -fPIC -w -fno-builtin -Wl,-soname,"$library" \
            -Wl,--version-script,"$1/stand_in.map" -o "$1/$library" "$1/stand_in.c" || return 1
    done
}

install() {  # torch $2, NumPy $3 ("": the newest) into the environment $1
    local pip=("$1/bin/python" -m pip install -q) torch_needs
    "${pip[@]}" --no-deps "torch==$2" || return 1
    torch_needs="$("$1/bin/python" -c '
import re
from importlib.metadata import requires
for need in requires("torch"):
    if "extra ==" not in need and not re.match("nvidia|cuda|triton|pytorch-triton", need):
        print(need)')" || return 1
    mapfile -t torch_needs <<<"$torch_needs"
    "${pip[@]}" "numpy${3:+==$3}" scipy "${torch_needs[@]}" 'setuptools>=77' \
        pytest pytest-timeout pytest-xdist hypothesis matplotlib scikit-learn tqdm || return 1
    "${pip[@]}" --no-deps bs-scheduler linearlr || return 1
    stand_in "$("$1/bin/python" -c '
import importlib.util as u
print(u.find_spec("torch").submodule_search_locations[0] + "/lib")')" || return 1
    "${pip[@]}" --no-deps --no-build-isolation -e .
}

table=()
status=0
for entry in "${matrix[@]}"; do
    IFS=/ read -r torch numpy version <<<"$entry"
    if ! python="$(if [ -n "$version" ]; then find_python "$version"; else echo "${PYTHON:-python3}"; fi)"; then
        table+=("$entry: not tried: no Python $version")
        continue
    fi
    venv="$VENVS/${entry//\//-}"
    echo "== $entry"
    if [ ! -e "$venv/installed" ]; then
        rm -rf "$venv"
        if ! "$python" -m venv "$venv" || ! install "$venv" "$torch" "$numpy" >"$venv/pip" 2>&1 ||
            ! "$venv/bin/python" -c 'import torch, adabatch' || ! touch "$venv/installed"; then
            tail -n 5 "$venv/pip"
            table+=("$entry: not tried: cannot be installed")
            status=1
            continue
        fi
    fi
    found="$("$venv/bin/python" -c 'import platform, numpy, torch
print("torch", torch.__version__, "numpy", numpy.__version__, "python", platform.python_version())')"
    "$venv/bin/python" -m pytest -p no:cacheprovider "${suite[@]}" 2>&1 | tee "$venv/log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || status=1
    table+=("$found: $(tail -n 1 "$venv/log")")
done
echo "== summary"
printf '%s\n' "${table[@]}"
exit $status
