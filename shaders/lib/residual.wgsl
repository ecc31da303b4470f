// What is normed: x plus a branch, as it is kept in `sum`.
@group(0) @binding(5) var<storage, read> branch: array<branch_Quad>;
@group(0) @binding(6) var<storage, read_write> sum: array<sum_Quad>;

fn residual(at: u32) -> vec4<f32> {
    let kept = sum_set(x_get(x[at]) + branch_get(branch[at]));
    sum[at] = kept;
    return sum_get(kept);
}
