# Sourced by every launcher: `launch run ...` becomes tunescope, in an environment made on first use.
tunescope_dir=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

launch() {
    if ! command -v python3 > /dev/null; then
        echo "tunescope: there is no python3 on the PATH." >&2
        echo "  Cure:  install Python 3.12 (apt install python3.12-venv), or activate an environment, and run again." >&2
        exit 2
    fi
    exec python3 "$tunescope_dir/_bootstrap.py" "$@"
}
