//! Loading a vendor's library: its path, and each symbol, is checked before anything is called. Nothing here panics.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A loaded library. It stays loaded for good: a driver's threads may still run in it.
#[derive(Debug)]
pub(crate) struct Library {
    library: std::mem::ManuallyDrop<libloading::Library>,
    /// What it was loaded as.
    pub(crate) name: String,
}

impl Library {
    /// Loads what `explicit` or the environment `variable` says, or else the first of `names` that is there. What a path
    /// names is the user's to answer for: loading a library runs its initialisers.
    pub(crate) fn open(
        explicit: Option<&Path>,
        variable: &str,
        names: &[&str],
    ) -> Result<Library, String> {
        let set = explicit
            .map(Path::to_path_buf)
            .or_else(|| std::env::var_os(variable).map(|path: OsString| PathBuf::from(path)));
        let candidates: Vec<PathBuf> = match set {
            Some(path) if path.as_os_str().is_empty() || path.as_os_str() == "off" => {
                return Err(format!("switched off by {variable} or the options"));
            }
            Some(path) => vec![path],
            None => names.iter().map(PathBuf::from).collect(),
        };
        let mut first = None;
        for path in &candidates {
            // SAFETY: a vendor's library, or what the user named; see above.
            match unsafe { libloading::Library::new(path) } {
                Ok(library) => {
                    let library = std::mem::ManuallyDrop::new(library);
                    return Ok(Library { library, name: path.display().to_string() });
                }
                Err(error) => {
                    first.get_or_insert_with(|| error.to_string());
                }
            }
        }
        let list: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        Err(format!(
            "cannot load {}: {}",
            list.join(" or "),
            first.unwrap_or_else(|| "no name to look for".into())
        ))
    }

    /// The function called `name`.
    ///
    /// # Safety
    /// `F` is the type of a function pointer with the signature that the library documents.
    pub(crate) unsafe fn get<F: Copy>(&self, name: &str) -> Result<F, String> {
        // SAFETY: the caller's. A symbol that is there may be null, which a function pointer must not be, but its option is.
        let symbol = unsafe { self.library.get::<Option<F>>(name.as_bytes()) };
        let function = symbol.ok().and_then(|symbol| *symbol);
        function.ok_or_else(|| format!("{} has no function {name}", self.name))
    }
}

/// Declares a table of functions, all of which a library must have: `Table::load(library, prefix)` names the first one missing.
/// `prefix` is what their names begin with besides.
macro_rules! functions {
    ($(#[$doc:meta])* $visibility:vis struct $table:ident $(<$generic:ident>)? { $($field:ident: $symbol:literal ($($argument:ty),* $(,)?) -> $result:ty;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        $visibility struct $table $(<$generic>)? { $($visibility $field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl $(<$generic: Copy>)? $table $(<$generic>)? {
            fn load(library: &$crate::native::load::Library, prefix: &str) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: the signatures are those of the vendor's headers.
                    $($field: unsafe { library.get::<unsafe extern "C" fn($($argument),*) -> $result>(&format!("{prefix}{}", $symbol)) }?,)*
                })
            }
        }
    };
}
pub(crate) use functions;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// A symbol whose address is zero, as a linker may make it.
    #[test]
    fn null_symbols_are_missing() {
        let dir = tempfile::tempdir().unwrap();
        let [source, path] = ["null.s", "libnull.so"].map(|name| dir.path().join(name));
        let text = ".globl nothing, something\n.set nothing, 0\nsomething: ret\n";
        std::fs::write(&source, text).unwrap();
        let args = ["-shared", "-nostdlib", "-o"];
        let made = std::process::Command::new("cc").args(args).args([&path, &source]).status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("no C compiler: not tested");
            return;
        }
        let library = Library::open(Some(&path), "", &[]).unwrap();
        // SAFETY: none is called.
        let get = |name: &str| unsafe { library.get::<unsafe extern "C" fn()>(name) };
        assert!(get("something").is_ok());
        assert!(get("nothing").unwrap_err().ends_with("has no function nothing"));
        assert!(get("none\0of these").is_err());
    }
}
