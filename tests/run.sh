#!/usr/bin/env bash
# All checks of the crate, from formatting to the programs: `bash tests/run.sh`.
#
# On Debian 12 with a Rust toolchain it needs nothing else: the two software Vulkan drivers and the Vulkan validation
# layer are installed with apt where they are missing (as root, or through sudo without a password). On other systems
# it runs on what is there, and ends with a line that says what was not checked.
#
#   MX_TEST_GPU=require   fail where a driver or the validation layer is missing
#   MX_TEST_GPU=off       install nothing, test the CPU engine alone
#   VK_DRIVER_FILES=...   test these drivers too, e.g. a hardware one's file in /usr/share/vulkan/icd.d
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

mode=${MX_TEST_GPU:-auto}
case $mode in
    auto | require | off) ;;
    *)
        echo "MX_TEST_GPU=$mode: auto, require or off" >&2
        exit 2
        ;;
esac
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
chromium=/usr/lib/chromium
checked=()
unchecked=()
now="the preparations"

mkdir -p target
scratch=$(mktemp -d "$PWD/target/run.XXXXXX")
finish() {
    local status=$?
    rm -rf "$scratch"
    [ "$status" -eq 0 ] || echo "run.sh: FAILED in $now, after $SECONDS s" >&2
}
trap finish EXIT

# Runs a command under a name, announced with the time since the start. Into a file or a pipe goes only what fails: its last
# lines, which would be lost among a thousand others.
step() {
    now=$1
    shift
    echo
    echo "==> [${SECONDS} s] $now: $*"
    if [ -t 1 ]; then
        "$@"
    else
        "$@" >"$scratch/log" 2>&1 || {
            local status=$?
            tail -n 200 "$scratch/log"
            exit "$status"
        }
    fi
    checked+=("$now")
}

skip() {
    echo
    echo "==> [${SECONDS} s] NOT CHECKED: $1"
    unchecked+=("$1")
}

# ---- What the tests need -------------------------------------------------------------------------------------------

for tool in fmt clippy; do
    cargo "$tool" --version >/dev/null 2>&1 || {
        echo "cargo $tool is missing: rustup component add rustfmt clippy" >&2
        exit 1
    }
done

# Each prints a path, or nothing.
llvmpipe() {
    local file
    for file in /usr/share/vulkan/icd.d/lvp_icd*.json; do
        [ ! -f "$file" ] || { echo "$file" && return; }
    done
}
swiftshader() {
    local json=$chromium/vk_swiftshader_icd.json
    [ ! -f "$json" ] || [ ! -f "$chromium/libvk_swiftshader.so" ] || echo "$json"
}
layer() {
    local library=$chromium/libVkLayer_khronos_validation.so
    [ ! -f "$library" ] || echo "$library"
}

packages=()
command -v cc >/dev/null || packages+=(gcc libc6-dev)
# Of the compilers for GPUs that are not here.
python3 -c 'import venv, ensurepip' 2>/dev/null || packages+=(python3-venv)
if [ "$mode" != off ]; then
    [ -n "$(llvmpipe)" ] || packages+=(libvulkan1 mesa-vulkan-drivers)
    [ -n "$(swiftshader)" ] && [ -n "$(layer)" ] || packages+=(chromium-common)
fi
if [ ${#packages[@]} -gt 0 ]; then
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
    now="the installation of ${packages[*]}"
    echo "==> [${SECONDS} s] installing ${packages[*]}"
    if ! command -v apt-get >/dev/null; then
        echo "no apt-get here; missing: ${packages[*]}" >&2
    elif [ ${#as_root[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; then
        echo "neither root nor sudo without a password; missing: ${packages[*]}" >&2
    else
        apt() {
            "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >/dev/null
        }
        apt update && apt install -y --no-install-recommends "${packages[@]}" ||
            echo "the installation failed; missing: ${packages[*]}" >&2
    fi
fi

drivers=()
missing=()
if [ "$mode" = off ]; then
    skip "every GPU (MX_TEST_GPU=off)"
else
    if [ -n "$(llvmpipe)" ]; then drivers+=("$(llvmpipe)"); else missing+=("the driver llvmpipe (mesa-vulkan-drivers)"); fi
    if [ -n "$(swiftshader)" ]; then drivers+=("$(swiftshader)"); else missing+=("the driver SwiftShader (chromium-common)"); fi
    [ -n "$(layer)" ] || missing+=("the Vulkan validation layer (chromium-common)")
fi
if [ ${#missing[@]} -gt 0 ]; then
    now="the search for drivers"
    for what in "${missing[@]}"; do skip "$what is not here"; done
    [ "$mode" != require ] || exit 1
fi
if [ "$mode" != off ]; then
    files=${VK_DRIVER_FILES:-}
    for file in "${drivers[@]}"; do
        case ":$files:" in
            *":$file:"*) ;;
            *) files=${files:+$files:}$file ;;
        esac
    done
    # Without any file the loader looks for drivers itself.
    [ -z "$files" ] || export VK_DRIVER_FILES=$files
fi
# An adapter for each of the two drivers must answer, where they are there.
export MX_TEST_ADAPTERS=${#drivers[@]}
if [ ${#drivers[@]} -gt 0 ]; then export MX_TEST_GPU=require; else export MX_TEST_GPU=$mode; fi
# Mesa complains without one.
mkdir -m 700 "$scratch/xdg"
export XDG_RUNTIME_DIR=$scratch/xdg

# ---- The checks ----------------------------------------------------------------------------------------------------

step "formatting" cargo fmt --all --check
step "lints" cargo clippy --all-targets --all-features -- -D warnings
step "lints without native routes" cargo clippy --all-targets -- -D warnings
step "lints without default features" cargo clippy --no-default-features --lib -- -D warnings
step "documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features
# Digests are half of what tests/kernels.rs takes, and once is enough: under the layer below, where it is there.
later=()
[ ${#drivers[@]} -eq 0 ] || [ -z "$(layer)" ] || later=(-- --skip digests_are)
step "tests (${#drivers[@]} software drivers)" cargo test --all-features "${later[@]}"
# Built as a program above, which the tests run; here its own.
step "tests of the train example" cargo test --all-features --example train

if [ ${#drivers[@]} -gt 0 ] && [ -n "$(layer)" ]; then
    # The layer comes without its manifest.
    cat >"$scratch/VkLayer_khronos_validation.json" <<EOF
{
  "file_format_version": "1.2.0",
  "layer": {
    "name": "VK_LAYER_KHRONOS_validation",
    "type": "GLOBAL",
    "library_path": "$(layer)",
    "api_version": "1.4.0",
    "implementation_version": "1",
    "description": "Khronos Validation Layer",
    "instance_extensions": [
      { "name": "VK_EXT_debug_report", "spec_version": "9" },
      { "name": "VK_EXT_debug_utils", "spec_version": "1" },
      { "name": "VK_EXT_layer_settings", "spec_version": "2" },
      { "name": "VK_EXT_validation_features", "spec_version": "2" }
    ]
  }
}
EOF
    step "tests under the validation layer" \
        env VK_LAYER_PATH="$scratch" MX_TEST_VALIDATION=require cargo test --all-features --test kernels -- digests_are
fi

# Compilers for GPUs that are not here, from PyPI; kept until the list of them changes.
native_tools() {
    local list=tests/codegen/requirements.txt
    cmp -s "$list" "$tools/requirements.txt" && return
    rm -rf "$tools"
    python3 -m venv "$tools" && "$tools/bin/pip" install --quiet -r "$list" && cp "$list" "$tools/requirements.txt"
}
tools=$PWD/target/native-tools
now="the installation of tests/codegen/requirements.txt"
if command -v python3 >/dev/null && native_tools; then
    step "code generated for native FP4" \
        env MX_NATIVE_TOOLS="$tools" cargo test --all-features --test codegen --test native_kernel --test spirv
else
    skip "the code generated for native FP4 (python3 with venv, and PyPI)"
fi

if command -v python3 >/dev/null; then
    step "README's tables are those of benches/results" python3 benches/table.py --check
else
    skip "README's tables (python3)"
fi

# The oldest compiler is said in three places.
msrv=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
msrv_is_documented() {
    local file
    for file in README.md CHANGELOG.md; do
        grep -q "MSRV.*${msrv//./\\.}\b" "$file" || {
            echo "$file does not say MSRV $msrv, as Cargo.toml does" >&2
            return 1
        }
    done
}
step "MSRV $msrv in README.md and CHANGELOG.md" msrv_is_documented
toolchain=$({ rustup toolchain list 2>/dev/null || true; } | sed -n "s/^\(${msrv//./\\.}[.-][^ ]*\).*/\1/p" | head -n 1)
if [ -n "$toolchain" ]; then
    step "build with Rust $msrv" env CARGO_TARGET_DIR=target/msrv cargo "+$toolchain" check
else
    skip "the build with Rust $msrv (rustup toolchain install $msrv)"
fi
wasm=wasm32-unknown-unknown
if [ -d "$(rustc --print target-libdir --target $wasm)" ]; then
    step "$wasm" cargo check --target $wasm --no-default-features
else
    skip "$wasm (rustup target add $wasm)"
fi
if cargo deny --version >/dev/null 2>&1; then
    step "licences, advisories and sources of the dependencies" cargo deny check
else
    skip "licences and advisories of the dependencies (cargo install cargo-deny)"
fi

step "self-test" cargo run --release --example info -- --selftest
step "quantize" cargo run --release --example quantize
step "matmul" cargo run --release --example matmul
step "bench" cargo run --release --example bench -- --quick --device cpu
step "train" cargo run --release --example train -- --device cpu --steps 40 --out "$scratch/train"

echo
summary="run.sh: ${#checked[@]} checks passed in $SECONDS s"
for ((i = 0; i < ${#unchecked[@]}; i++)); do
    if [ "$i" -eq 0 ]; then summary+="; NOT checked: "; else summary+=", "; fi
    summary+=${unchecked[$i]}
done
echo "$summary"
