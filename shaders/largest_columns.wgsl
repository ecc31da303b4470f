// largest_columns: the n columns with the largest amax, the largest first, of equals the lower index; and their bit mask.
// Layout:   amax[cols] · columns[n] · mask[ceil(cols/32)], zeroed before
// Numerics: exact
// Dispatch: one workgroup
// Twin:     src/kernels/outliers.rs

struct Params { cols: u32, n: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> amax: array<u32>;
@group(0) @binding(2) var<storage, read_write> columns: array<u32>;
@group(0) @binding(3) var<storage, read_write> mask: array<atomic<u32>>;

var<workgroup> wg_largest: array<atomic<u32>, 2>;
var<workgroup> wg_column: array<atomic<u32>, 2>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    // The last one taken: what comes next is smaller, or equal and further right. A magnitude has 31 bits.
    var last = 0xffffffffu;
    var last_column = 0u;
    for (var i = 0u; i < p.n; i++) {
        var best = 0u;
        var column = 0xffffffffu;
        for (var c = lane; c < p.cols; c += WG) {
            let a = amax[c];
            let after = a < last || (a == last && c > last_column);
            if (after && (a > best || column == 0xffffffffu)) {
                best = a;
                column = c;
            }
        }
        // Two sets of cells in turn: the next round's is cleared while this one's is read.
        let cell = i & 1u;
        if (i == 0u) {
            if (lane == 0u) {
                atomicStore(&wg_largest[0], 0u);
                atomicStore(&wg_column[0], 0xffffffffu);
            }
            workgroupBarrier();
        }
        if (column != 0xffffffffu) { atomicMax(&wg_largest[cell], best); }
        workgroupBarrier();
        last = atomicLoad(&wg_largest[cell]);
        if (column != 0xffffffffu && best == last) { atomicMin(&wg_column[cell], column); }
        if (lane == 0u) {
            atomicStore(&wg_largest[cell ^ 1u], 0u);
            atomicStore(&wg_column[cell ^ 1u], 0xffffffffu);
        }
        workgroupBarrier();
        last_column = atomicLoad(&wg_column[cell]);
        if (lane == 0u) {
            columns[i] = last_column;
            atomicOr(&mask[last_column / 32u], 1u << (last_column % 32u));
        }
    }
}
