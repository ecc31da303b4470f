// A subgroup's sums without cooperative matrices: each of its 32 invocations keeps FRAGMENT² / 32 elements of every fragment.

alias Word = u32;
const OWN = FRAGMENT * FRAGMENT / 32u;

alias Sums = array<Sum, FM * FN * OWN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN * OWN; f++) { (*sums)[f] = Sum(); }
}
