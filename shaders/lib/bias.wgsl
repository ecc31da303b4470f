fn bias_at(j: u32) -> u32 { return bias[p.y_col + j]; }
