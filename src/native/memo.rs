//! Answers that took time, by what was asked.

use std::collections::HashMap;
use std::hash::Hash;

#[derive(Debug)]
pub(crate) struct Memo<K, V> {
    known: HashMap<K, V>,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Memo<K, V> {
        Memo { known: HashMap::new() }
    }
}

impl<K: Eq + Hash, V> Memo<K, V> {
    /// What is known, or what `make` says now.
    pub(crate) fn get(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        self.known.entry(key).or_insert_with(make)
    }
}
