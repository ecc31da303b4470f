#!/usr/bin/env bash
# Gathers in TO what README's table of quality was trained on: the Python, C, C++, Rust and documentation sources of this machine;
# with CRATES (~/.cargo/registry/src/*) the crates that this one is built from, with LINUX (Debian's linux-source-6.1,
# 6.1.192-2, unpacked) parts of its kernel. On a machine with CUDA 13, PyTorch 2.11 and JAX the trainer then finds 835.8 MB of text
# in 56563 files, copies left out.
#
#     bash benches/text.sh TO [CRATES [LINUX]]
set -euo pipefail
to=$(realpath -m "${1:?TO [CRATES [LINUX]]}")
mkdir -p "$to"
names=()
for ending in py pyi pyx pxd h hpp hh inl inc cuh cu c cc cpp rst md txt cmake rs pl pm sh; do
    names+=(-o -name "*.$ending")
done
# What begins with a dot would be left out by the trainer. Files that vanish or cannot be read do not matter.
copy() {
    LC_ALL=C sort -z | tar -cf - --null --transform 's,/\.,/_,g' -T - 2>/dev/null | tar -xf - -C "$1"
}
{ find /opt /usr /root /home -xdev \( -path "$to" -o -path /usr/local/nvidia \) -prune -o \
    -type f -size -4096k \( "${names[@]:1}" \) -print0 2>/dev/null || true; } | copy "$to" || true
if [ $# -gt 1 ]; then
    mkdir -p "$to/rust"
    (cd "$2" && find . -name '*.rs' -size -4096k -print0 | copy "$to/rust")
fi
if [ $# -gt 2 ]; then
    mkdir -p "$to/linux-6.1"
    (cd "$3" && find Documentation block crypto fs init ipc kernel lib mm net security -type f \
        \( -name '*.[chS]' -o -name '*.rst' -o -name '*.txt' -o -name '*.py' \) -print0 | copy "$to/linux-6.1")
fi
du -sh "$to"
