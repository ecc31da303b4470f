// y of whole words a row: every word is one invocation's.

fn y_load(word: u32) -> u32 { return y[word]; }
fn y_write(word: u32, value: u32) { y[word] = value; }
// Not used: rows are whole words.
fn y_put_half(at: u32, value: u32) { }
