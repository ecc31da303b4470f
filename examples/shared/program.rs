//! What every program does around its work.

use std::any::Any;
use std::io::{self, ErrorKind};
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

use crate::Result;

/// Runs a program. An error is one line, whatever a driver says. Where nobody reads the standard output any more (`… | head`),
/// the program ends without a word; what it has not finished is cleared away as after any error.
pub fn run(program: impl FnOnce() -> Result<()>) -> ExitCode {
    env_logger::init();
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !unread(info.payload()) {
            hook(info);
        }
    }));
    match panic::catch_unwind(AssertUnwindSafe(program)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let closed = |error: &io::Error| error.kind() == ErrorKind::BrokenPipe;
            if !error.downcast_ref().is_some_and(closed) {
                eprintln!("error: {}", error.to_string().lines().collect::<Vec<_>>().join(" "));
            }
        }
        Err(payload) if unread(&*payload) => {}
        Err(payload) => panic::resume_unwind(payload),
    }
    ExitCode::FAILURE
}

/// Whether this is what `print!` panics with on a closed pipe: it has no other way to say so.
fn unread(payload: &(dyn Any + Send)) -> bool {
    let text = payload.downcast_ref::<String>().map_or("", String::as_str);
    text.starts_with("failed printing to stdout") && text.contains(&closed_pipe())
}

/// As the system words it.
fn closed_pipe() -> String {
    // EPIPE, ERROR_NO_DATA.
    io::Error::from_raw_os_error(if cfg!(windows) { 232 } else { 32 }).to_string()
}
