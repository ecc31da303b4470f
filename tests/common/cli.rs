//! The examples as their users run them: in a directory of their own, with arguments, output and exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// An example, beside the directory of this test: `cargo test` builds it.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let path = test.parent().and_then(Path::parent).unwrap().join("examples").join(file);
    assert!(path.is_file(), "{} is missing: cargo build --example {name}", path.display());
    path
}

/// A directory in which a program runs.
pub struct Dir {
    dir: TempDir,
    program: PathBuf,
}

impl Dir {
    pub fn new(program_name: &str) -> Dir {
        Dir { dir: tempfile::tempdir().unwrap(), program: program(program_name) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The program, or `shell` around it, in which it is `$0`.
    pub fn command(&self, shell: Option<&str>, args: &[&str]) -> Command {
        let mut command = match shell {
            None => Command::new(&self.program),
            Some(line) => {
                let mut command = Command::new("sh");
                command.args(["-c", line]).arg(&self.program);
                command
            }
        };
        command.args(args).current_dir(self.dir.path()).env_remove("RUST_LOG");
        // Mesa complains on stderr without one.
        command.env("XDG_RUNTIME_DIR", self.dir.path());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(None, args).output().unwrap()
    }

    /// The program, whose output nobody reads: it must end without a word, and leave no unfinished file.
    #[track_caller]
    pub fn unread(&self, args: &[&str]) {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = self.command(None, args).stdout(writer).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let names = self.names();
        assert!(names.iter().all(|name| !name.starts_with('.')), "{args:?}: {names:?}");
    }
}
