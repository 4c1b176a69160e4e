#!/usr/bin/env bash
# Make the environment .venv of this checkout and install the lock into it, then kvplug itself.
# Called by make: PYTHON names the interpreter, TORCH_INDEX (optional) an index of torch's CPU
# wheels. Every file is compared with the digests in the lock, but a torch from TORCH_INDEX: an
# index named by hand is taken at its word. Exits 0 only when everything is in and torch imports.
set -euo pipefail

cd "$(dirname "$0")/.."
venv=.venv
lock=requirements/cpu.lock
log=$venv/install.log
python=${PYTHON:?set PYTHON to the interpreter to use}
torch_index=${TORCH_INDEX:-}

die() {
    printf 'kvplug: %s\n' "$*" >&2
    exit 1
}

export PIP_DISABLE_PIP_VERSION_CHECK=1

# The pin of a package, without its digests.
pin() {
    sed -n "s/^\($1==[^ ]*\).*/\1/p" "$lock"
}

# Install with pip, quietly; on failure say what was missing and what to do.
pip_install() {
    local missing other
    if "$venv/bin/python" -m pip install --quiet --no-input --no-deps "$@" >>"$log" 2>&1; then
        return
    fi
    missing=$(sed -n -e 's/^ERROR: No matching distribution found for \([^ ]*\).*/\1/p' \
        -e 's/^ERROR: Cannot install \([^ ]*\) because.*/\1/p' "$log" | tail -n 1)
    if [ -n "$missing" ]; then
        die "pip found no $missing for $("$venv/bin/python" -V) on $(uname -sm):" \
            "point pip at an index that has it (pip config list shows the one in use)," \
            "or pin what your index has with 'make lock'; the whole log is $log."
    fi
    other=$(sed -n '/DO NOT MATCH THE HASHES/,$ s/^ \{1,8\}\([^ ]*\) from .*/\1/p' "$log" | tail -n 1)
    case $other in
    torch==*)
        die "pip's index serves another build of $other than the CPU build that $lock has the" \
            "digest of, most likely one for a GPU: run 'make TORCH_INDEX=URL setup', URL being" \
            "an index of torch's CPU wheels; the whole log is $log."
        ;;
    ?*)
        die "what pip's index serves as $other is not the file that $lock has the digest of:" \
            "point pip at an index with the published files, or, if you trust this one, write" \
            "its digests with 'make lock'; the whole log is $log."
        ;;
    esac
    tail -n 15 "$log" >&2
    die "pip failed as shown above: mend that and run make again; the whole log is $log."
}

torch_imports() {
    "$venv/bin/python" -c 'import torch' >/dev/null 2>&1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" ||
        die "$python -m venv failed: install Python's venv module (on Debian: python3-venv)."
fi
rm -f "$venv"/.installed-*
: >"$log"

# The one package that is built from source, the demo's text, is built with the pinned setuptools.
pin setuptools >"$venv/build-constraints.txt"
export PIP_CONSTRAINT=$venv/build-constraints.txt PIP_BUILD_CONSTRAINT=$venv/build-constraints.txt

echo "kvplug: installing $(grep -c == "$lock") pinned packages into $venv (some minutes)"
if [ -n "$torch_index" ] && ! torch_imports; then
    pip_install --force-reinstall --index-url "$torch_index" "$(pin torch)"
fi
pip_install --require-hashes -r "$lock"
if ! torch_imports; then
    "$venv/bin/python" -c 'import torch' 2>&1 | tail -n 1 >&2 || true
    die "torch does not import (above): most likely pip's index served a build for a GPU;" \
        "run 'make TORCH_INDEX=URL setup', URL being an index of torch's CPU wheels."
fi

pip_install --no-build-isolation -e .
for package in kvplug/kvplug_lab/pyproject.toml policies/*/pyproject.toml \
    docs/examples/*/pyproject.toml; do
    if [ -e "$package" ]; then
        pip_install --no-build-isolation -e "$(dirname "$package")"
    fi
done
