//! Stand-ins for vendors' libraries, tests/standins: compiled here, a copy for each test, so that what is set in one does not
//! show in another.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

pub struct Standin {
    pub path: PathBuf,
    library: libloading::Library,
}

/// Where stand-ins are.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

/// tests/standins/`name`.rs, as a library without the functions `without`.
pub fn standin(name: &str, without: &[&str]) -> Standin {
    static COMPILED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static COPIES: AtomicUsize = AtomicUsize::new(0);
    let built = folder().join(format!("lib{name}.so"));
    {
        let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
        if !compiled.iter().any(|known| known == name) {
            let source =
                Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/standins/{name}.rs"));
            let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            let output = Command::new(rustc)
                .args(["--crate-type", "cdylib", "--edition", "2024", "-C", "panic=abort"])
                .args(["-O", "-o"])
                .args([&built, &source])
                .output()
                .expect("rustc");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            compiled.push(name.into());
        }
    }
    let mut bytes = std::fs::read(&built).unwrap();
    for function in without {
        let function = format!("\0{function}\0");
        let places: Vec<usize> = (0..bytes.len() - function.len())
            .filter(|at| &bytes[*at..*at + function.len()] == function.as_bytes())
            .collect();
        assert!(!places.is_empty(), "{name} has no {function}");
        for at in places {
            bytes[at + 1] = b'_';
        }
    }
    let copy = COPIES.fetch_add(1, Ordering::Relaxed);
    let path = folder().join(format!("lib{name}-{copy}.so"));
    std::fs::write(&path, bytes).unwrap();
    // SAFETY: the library has no initialisers but Rust's own.
    let library = unsafe { libloading::Library::new(&path) }.unwrap();
    Standin { path, library }
}

impl Standin {
    /// A setting, by the stand-in's number.
    pub fn set(&self, key: u32, value: u64) {
        // SAFETY: the signature is the stand-in's.
        unsafe {
            let set: libloading::Symbol<'_, unsafe extern "C" fn(u32, u64)> =
                self.library.get(b"standin_set").unwrap();
            set(key, value);
        }
    }

    /// Gives the stand-in's device the UUID that Vulkan gives the adapter.
    pub fn identify(self, adapter: &wgpu::Adapter) -> Standin {
        let uuid = u128::from_be_bytes(uuid(adapter));
        self.set(0, (uuid >> 64) as u64);
        self.set(1, uuid as u64);
        self
    }

    fn text(&self, name: &str) -> String {
        // SAFETY: the signature is the stand-in's, and the second call has as much room as it is told.
        unsafe {
            let text: libloading::Symbol<'_, unsafe extern "C" fn(*mut u8, usize) -> usize> =
                self.library.get(name.as_bytes()).unwrap();
            let mut bytes = vec![0; text(std::ptr::null_mut(), 0)];
            text(bytes.as_mut_ptr(), bytes.len());
            String::from_utf8(bytes).unwrap()
        }
    }

    /// Every call so far.
    pub fn log(&self) -> String {
        self.text("standin_log")
    }

    /// What was made and is not destroyed, and what was destroyed wrongly.
    pub fn left(&self) -> String {
        self.text("standin_left")
    }
}

fn uuid(adapter: &wgpu::Adapter) -> [u8; 16] {
    let mut id = ash::vk::PhysicalDeviceIDProperties::default();
    // SAFETY: the handles are only used within this function.
    unsafe {
        let Some(hal) = adapter.as_hal::<wgpu::hal::api::Vulkan>() else { return [0; 16] };
        let mut all = ash::vk::PhysicalDeviceProperties2::default().push_next(&mut id);
        let instance = hal.shared_instance().raw_instance();
        instance.get_physical_device_properties2(hal.raw_physical_device(), &mut all);
    }
    id.device_uuid
}
