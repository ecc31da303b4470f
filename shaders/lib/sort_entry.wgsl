// What a pass of the sort reads: the entries in the order of the pass before, at first as they come; ids at or above the
// bound are left out then.

struct Params {
    len: u32,
    bound: u32,
    shift: u32,     // of the digit
    initial: u32,   // whether this is the first pass
    chunks: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> before: array<u32>;
// counts[chunks, 256 digits], then how many entries there are.
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;

const NONE = 256u;

struct Entry { index: u32, digit: u32 }

fn entry(place: u32) -> Entry {
    var index = place;
    if (p.initial == 0u) {
        if (place >= counts[p.chunks * 256u]) { return Entry(0u, NONE); }
        index = before[place];
    } else if (place >= p.len || ids[place] >= p.bound) {
        return Entry(0u, NONE);
    }
    return Entry(index, (ids[index] >> p.shift) & 0xffu);
}
