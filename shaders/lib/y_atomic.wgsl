// y of 16-bit elements whose rows end within words: two invocations may own the halves of one.

fn y_load(word: u32) -> u32 { return atomicLoad(&y[word]); }
fn y_write(word: u32, value: u32) { atomicStore(&y[word], value); }

fn y_put_half(at: u32, value: u32) {
    let shift = 16u * (at % 2u);
    atomicAnd(&y[at / 2u], ~(0xffffu << shift));
    atomicOr(&y[at / 2u], narrow(value) << shift);
}
