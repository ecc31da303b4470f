// Integers of eight bits, and sums of 32.

alias Sum = i32;

fn byte_value(byte: u32) -> Sum { return extractBits(i32(byte), 0u, 8u); }

fn sum_of(a: Sum, b: Sum, sum: Sum) -> Sum { return sum + a * b; }
