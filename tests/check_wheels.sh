#!/usr/bin/env bash
# Install the wheels of dist/ into fresh environments and run the self-test of each, with no compiler
# on the PATH:  tests/check_wheels.sh PYTHON TORCH...   such as  python3 torch==2.13.0 torch==2.11.0
# A TORCH that is a folder is an environment that has torch already: it is used through, not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

built=$(ls dist/*manylinux*.whl)
pure=$(ls dist/*-none-any.whl)
mkdir "$work/bin" "$work/elsewhere"
for torch in "$@"; do
  for wheel in "$built" "$pure"; do
    environment="$work/environment"
    rm -rf "$environment"
    "$python" -m venv "$environment"
    if [[ -d $torch ]]; then
      "$torch"/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
        > "$(echo "$environment"/lib/python*/site-packages)/torch-of-another.pth"
      "$environment"/bin/pip install --quiet --no-deps "$wheel"
      "$environment"/bin/pip install --quiet --no-deps safetensors numpy
    else
      "$environment"/bin/pip install --quiet "$torch" "$wheel"
    fi
    # Elsewhere, so that the clone's own package is not what is imported.
    report=$(cd "$work/elsewhere" && PATH="$work/bin" PYTHONWARNINGS=ignore \
      "$environment"/bin/python -m lora_ext) || { echo "$report"; exit 1; }
    if [[ $wheel == "$built" ]]; then expected=cpp; else expected=reference; fi
    if ! grep -q "works on cpu with backend '$expected'" <<< "$report"; then
      echo "$report"
      echo "$(basename "$wheel") with $torch: expected to work with backend '$expected'" >&2
      exit 1
    fi
    echo "$(basename "$wheel") with $torch: $(tail -1 <<< "$report")"
  done
done
