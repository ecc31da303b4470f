//! Ctrl-C.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Result;

/// Whether the program is asked to end. The first request (Ctrl-C, or a signal to terminate or hang up) is for the loop
/// of training to see, which finishes its step and saves; the second ends the program at once.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens from now on; once in a program.
    pub fn listen() -> Result<Interrupt> {
        let asked = Arc::new(AtomicBool::new(false));
        let interrupt = Interrupt(asked.clone());
        ctrlc::set_handler(move || {
            if asked.swap(true, Ordering::Relaxed) {
                // What a shell reports of a program that SIGINT ended.
                std::process::exit(130);
            }
            // The terminal may be gone, which is then why.
            let _ = writeln!(
                io::stderr(),
                "\nfinishing the step and saving; Ctrl-C again leaves at once, without"
            );
        })?;
        Ok(interrupt)
    }

    /// Whether it was asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
