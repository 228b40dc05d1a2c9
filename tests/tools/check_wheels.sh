#!/usr/bin/env bash
# Install the wheels of dist/ into a fresh environment for each torch and run the self-test, with no
# compiler on the PATH:  tests/tools/check_wheels.sh PYTHON TORCH...  such as  python3 torch==2.13.0
# A TORCH that is a folder is an environment that has torch already: its packages are used as well.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/no_compiler"

# check WHEEL BACKEND TORCH: the report's last line, if the wheel works with that backend.
check() {
  "$environment"/bin/pip install --quiet --no-compile --no-deps --force-reinstall "$1"
  # Not in the clone, whose own package would be what is imported.
  report=$(cd "$work" && PATH="$work/no_compiler" PYTHONWARNINGS=ignore \
    "$environment"/bin/python -m lora_ext) || { echo "$report"; exit 1; }
  if ! grep -q "works on cpu with backend '$2'" <<< "$report"; then
    echo "$report"
    echo "$(basename "$1") with $3: expected to work with backend '$2'" >&2
    exit 1
  fi
  echo "$(basename "$1") with $3: $(tail -1 <<< "$report")"
}

for torch in "$@"; do
  environment="$work/environment"
  rm -rf "$environment"
  "$python" -m venv "$environment"
  if [[ -d $torch ]]; then
    "$torch"/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      > "$(echo "$environment"/lib/python*/site-packages)/torch-of-another.pth"
    torch=$("$torch"/bin/python -c 'import torch; print("torch", torch.__version__)')
  else
    "$environment"/bin/pip install --quiet --no-compile "$torch" numpy safetensors
  fi
  check dist/*manylinux*.whl cpp "$torch"
  check dist/*-none-any.whl reference "$torch"
done
