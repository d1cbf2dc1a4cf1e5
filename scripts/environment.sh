# Sourced by run_*.sh. `use_python` puts a Python that has the packages into $PYTHON; `use_python FILE_OR_PACKAGE...`
# also makes .venv and installs them when they are missing. An environment of one's own is used as it is, if it is
# active (venv, conda) or named in $PYTHON, and has the packages (and the modules in $TEST_MODULES).
# TORCH_INDEX=URL names the index that a new .venv takes torch and torchvision from, such as that of the CPU builds.

TEST_MODULES=${TEST_MODULES:-}

# glibc returns a freed block of megabytes to the system at once, and the next tensor is faulted in page by page. Kept
# blocks save a sixth of the CPU time of a SeCo step. The peak of the memory stays what it was.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-2147483647}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-67108864}

fail() { echo "$1" >&2; exit 2; }

# What a Python lacks of requirements.txt and $TEST_MODULES, in one line; nothing if it has all of it.
lacks() {
  "$1" - $TEST_MODULES <<'PY' || echo "a Python from 3.10 on that runs"
import re, sys
sys.version_info >= (3, 10) or sys.exit(1)
from importlib.util import find_spec

required = re.findall(r"^([\w-]+)", open("requirements.txt").read(), re.M)
modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
print(*[name for name in [*sys.argv[1:], *required] if find_spec(modules.get(name.lower(), name)) is None], sep=", ", end="")
PY
}

use_python() {
  local lacking=
  if [ -n "${PYTHON:-}" ]; then
    lacking=$(lacks "$PYTHON")
    [ -z "$lacking" ] || fail "PYTHON=$PYTHON lacks $lacking (requirements.txt; for the tests also pytest pytest-xdist hypothesis ruff mypy)"
    return
  fi
  if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    lacking=$(lacks python)
    if [ -z "$lacking" ]; then PYTHON=python; return; fi
    echo "the active environment lacks $lacking: using .venv" >&2
  fi
  if [ $# -eq 0 ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; return; fi
    if [ -z "$(lacks python3)" ]; then PYTHON=python3; return; fi
    echo "no Python with the packages of requirements.txt: run 'bash run_demo.sh' once (it makes .venv)," >&2
    echo "or activate an environment of yours after 'pip install -r requirements.txt'" >&2
    exit 2
  fi
  PYTHON=.venv/bin/python
  # The stamp holds what was installed: nothing is asked of the package index while it is up to date.
  local wanted stamp=.venv/installed
  wanted=$(cat requirements.txt; printf '%s\n' "$@")
  if [ -x "$PYTHON" ] && [ -f "$stamp" ] && grep -qxF -- "$(printf '%s' "$wanted" | cksum)" "$stamp"; then return; fi
  local base=
  for base in python3 python python3.13 python3.12 python3.11 python3.10; do
    if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then break; fi
    base=
  done
  if [ -z "$base" ]; then echo "Python 3.10 or newer is needed and was not found" >&2; exit 2; fi
  echo "installing into .venv (once; some minutes, PyTorch is large) ..."
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # none yet, or one that broke off half-way
    if ! "$base" -m venv --clear .venv; then
      echo "$base cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2
      exit 2
    fi
  fi
  # Before the other packages, which then keep the build that is there.
  if [ -n "${TORCH_INDEX:-}" ]; then
    local torch
    torch=$(grep -E '^torch(vision)?[^a-z]' requirements.txt)
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --index-url "$TORCH_INDEX" $torch
  fi
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
  printf '%s' "$wanted" | cksum >> "$stamp"
}

misused() { fail "$1 (bash $(basename "$0") --help)"; }

# `launch DEVICE_FLAG SCRIPT WORD...` ends as torchrun on SCRIPT, with $processes, $port and $devices of the command line;
# DEVICE_FLAG is how the script takes its device: device= or --device=.
launch() {
  local device_flag=$1 script=$2 home; shift 2
  home=$(dirname "${BASH_SOURCE[0]}")
  if [ "$devices" = cpu ]; then
    set -- "${device_flag}cpu" "$@"
    export CUDA_VISIBLE_DEVICES=
  elif [ -n "$devices" ]; then
    export CUDA_VISIBLE_DEVICES=$devices
  fi
  # GPUs that were asked for and are not there are an error, not a reason to compute on the CPU.
  if [ "$devices" != cpu ] && { [ -n "$devices" ] || [ "$processes" -gt 1 ]; }; then set -- "${device_flag}cuda" "$@"; fi
  # torchrun gives every process one thread unless OMP_NUM_THREADS is set: share the cores of the job.
  local cores
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( (cores + processes - 1) / processes ))}
  exec "$PYTHON" "$home/torchrun.py" --nproc_per_node="$processes" --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" "$script" "$@"
}

# Ends with an error unless $script, $processes, $port and $devices are a script, two numbers and cpu or GPUs.
check_positions() {
  local gpu='([0-9]+|(GPU|MIG)-[A-Za-z0-9/-]+)' commas=${devices//[^,]/}
  [ -f "$script" ] || misused "script '$script' does not exist"
  [[ $processes =~ ^[1-9][0-9]*$ ]] || misused "GPUS must be a number of processes, got '$processes'"
  [[ $port =~ ^[0-9]+$ ]] && [ "$port" -le 65535 ] || misused "PORT must be a number up to 65535, got '$port'"
  if [ "${NNODES:-1}" != 1 ]; then  # torchrun would wait for the others, on this machine, for ever
    [ -n "${MASTER_ADDR:-}" ] && [ -n "${NODE_RANK:-}" ] || misused "NNODES=$NNODES needs MASTER_ADDR (the first node) and NODE_RANK"
  fi
  if [ -z "$devices" ] || [ "$devices" = cpu ]; then return; fi
  [[ $devices =~ ^$gpu(,$gpu)*$ ]] || misused "DEVICES must be cpu or GPUs such as 0,1,2,3, got '$devices'"
  [ "$processes" -le $(( ${#commas} + 1 )) ] || misused "$processes processes need as many GPUs, DEVICES names $(( ${#commas} + 1 )): '$devices'"
}
