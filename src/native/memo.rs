//! Answers that took time, by what was asked.

use std::collections::HashMap;
use std::hash::Hash;

/// Programs with ever other shapes are not to fill the memory: when so many are known, all are forgotten, and asked for anew.
pub(crate) const CAP: usize = 256;

#[derive(Debug)]
pub(crate) struct Memo<K, V> {
    known: HashMap<K, V>,
    room: usize,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Memo<K, V> {
        Memo { known: HashMap::new(), room: CAP }
    }
}

impl<K: Eq + Hash, V> Memo<K, V> {
    /// Whether what is asked next makes all others forgotten.
    pub(crate) fn is_full(&self, key: &K) -> bool {
        self.known.len() >= self.room && !self.known.contains_key(key)
    }

    pub(crate) fn clear(&mut self) {
        self.known.clear();
        self.room = CAP;
    }

    /// Makes room where answers cannot be forgotten yet.
    pub(crate) fn grow(&mut self) {
        self.room += CAP;
    }

    /// What is known, or what `make` says now.
    pub(crate) fn get(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        if self.is_full(&key) {
            self.clear();
        }
        self.known.entry(key).or_insert_with(make)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_up_to_a_number() {
        let mut memo = Memo::default();
        let mut asked = 0;
        let mut ask = |key: usize| {
            let value = *memo.get(key, || {
                asked += 1;
                2 * key
            });
            assert_eq!(value, 2 * key);
            (memo.known.len(), asked)
        };
        for key in 0..CAP {
            assert_eq!(ask(key), (key + 1, key + 1));
        }
        // What is known stays known when no more fit.
        assert_eq!(ask(7), (CAP, CAP));
        assert_eq!(ask(CAP), (1, CAP + 1));
        assert_eq!(ask(7), (2, CAP + 2));
        for key in 0..10 * CAP {
            assert!(ask(key).0 <= CAP);
        }
        let mut memo = Memo::default();
        for key in 0..CAP {
            memo.get(key, || ());
        }
        memo.grow();
        assert!(!memo.is_full(&CAP));
        memo.get(CAP, || ());
        assert_eq!(memo.known.len(), CAP + 1);
        memo.clear();
        assert_eq!((memo.known.len(), memo.room), (0, CAP));
    }
}
