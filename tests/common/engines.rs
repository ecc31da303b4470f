//! A suite is stamped on every engine: the CPU, and every adapter that wgpu finds, in several forms.
//!
//! `MX_TEST_GPU=auto` (default) tests the adapters that are there, `require` fails where there is none, `off` tests the
//! CPU alone. `MX_TEST_ADAPTERS=2` requires that many. `MX_TEST_VALIDATION=require` opens the devices under Vulkan's
//! validation layer and fails on any message of it. What an adapter lacks shows as ignored, never as passed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::{Context, Error, Options, engine, wgpu};

/// The second argument: test every so many-th case.
pub type Test = fn(&Context, usize) -> Result<(), Failed>;

/// A way to open an adapter.
pub struct Form {
    /// Added to the adapter's name.
    pub what: &'static str,
    pub options: Options,
    /// Every so many-th case on hardware, and on software drivers, which take up to seconds for a pipeline.
    pub steps: [usize; 2],
    /// Features without which it cannot be tested, and what to say then.
    pub needs: (wgpu::Features, &'static str),
}

/// An adapter as it is.
pub const PLAIN: &str = "";
/// The CPU engine.
pub const CPU: &str = "cpu";

/// One way to run a program.
struct Engine {
    label: String,
    form: &'static str,
    open: Arc<dyn Fn() -> Result<Context, Error> + Send + Sync>,
    step: usize,
    /// Why it cannot be tested here.
    lacks: Option<String>,
}

/// Runs on every engine the tests that `suite` lists for its form, and `alone` once.
pub fn run(suite: fn(form: &str) -> Vec<(&'static str, Test)>, forms: &[Form], alone: Vec<Trial>) {
    let args = Arguments::from_args();
    let validation = match std::env::var("MX_TEST_VALIDATION").as_deref() {
        Ok("require") => true,
        Ok("off") | Err(_) => false,
        Ok(other) => panic!("MX_TEST_VALIDATION={other}: require or off"),
    };
    LOG.install(validation);
    let mut trials = alone;
    for engine in engines(validation, forms) {
        for (name, test) in suite(engine.form) {
            let (open, step) = (Arc::clone(&engine.open), engine.step);
            let name = match &engine.lacks {
                Some(why) => format!("{} [{why}] {name}", engine.label),
                None => format!("{} {name}", engine.label),
            };
            let ignored = engine.lacks.is_some();
            trials.push(
                Trial::test(name, move || {
                    let ctx = open().map_err(|error| error.to_string())?;
                    test(&ctx, step)?;
                    ctx.wait_blocking().map_err(|error| error.to_string())?;
                    LOG.check()
                })
                .with_ignored_flag(ignored),
            );
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn engines(validation: bool, forms: &[Form]) -> Vec<Engine> {
    let mut engines = vec![Engine {
        label: "CPU".into(),
        form: CPU,
        open: Arc::new(|| Ok(Context::cpu())),
        step: 1,
        lacks: None,
    }];
    let mode = std::env::var("MX_TEST_GPU").unwrap_or_else(|_| "auto".into());
    assert!(
        ["auto", "require", "off"].contains(&&*mode),
        "MX_TEST_GPU={mode}: auto, require or off"
    );
    let adapters =
        if mode == "off" { Vec::new() } else { pollster::block_on(engine::adapters(validation)) };
    let required: usize = match std::env::var("MX_TEST_ADAPTERS") {
        Ok(n) => n.parse().expect("MX_TEST_ADAPTERS is a number"),
        Err(_) => usize::from(mode == "require"),
    };
    assert!(adapters.len() >= required, "{required} adapters required, {} found", adapters.len());
    for adapter in adapters {
        let info = adapter.get_info();
        let label = format!("{:?} {}", info.backend, info.name);
        eprintln!("adapter: {label}, {} {}", info.driver, info.driver_info);
        let software = info.device_type == wgpu::DeviceType::Cpu;
        for form in forms {
            let (needs, why) = form.needs;
            let has = adapter.features().contains(needs);
            let (adapter, options) = (adapter.clone(), form.options.clone());
            // One device an engine: opening takes long on some drivers, and pipelines are kept.
            let shared: Mutex<Option<Context>> = Mutex::new(None);
            let open = move || {
                let mut shared = shared.lock().unwrap_or_else(|e| e.into_inner());
                if shared.is_none() {
                    *shared = Some(pollster::block_on(Context::on_adapter(&adapter, &options))?);
                }
                Ok(shared.clone().expect("just opened"))
            };
            engines.push(Engine {
                label: format!("{label}{}", form.what),
                form: form.what,
                open: Arc::new(open),
                step: form.steps[usize::from(software)],
                lacks: (!has).then(|| why.to_string()),
            });
        }
    }
    engines
}

// ---- Messages of the validation layer ------------------------------------------------------------------------------

static LOG: Log = Log {
    layer_seen: AtomicUsize::new(0),
    messages: Mutex::new(Vec::new()),
    required: AtomicUsize::new(0),
};

/// Keeps what wgpu-hal logs: the validation layer's messages come that way.
struct Log {
    layer_seen: AtomicUsize,
    messages: Mutex<Vec<String>>,
    required: AtomicUsize,
}

impl Log {
    fn install(&'static self, required: bool) {
        self.required.store(usize::from(required), Ordering::Relaxed);
        log::set_logger(self).expect("first logger");
        log::set_max_level(log::LevelFilter::Debug);
    }

    fn check(&self) -> Result<(), Failed> {
        let mut messages = self.messages.lock().unwrap();
        if !messages.is_empty() {
            return Err(std::mem::take(&mut *messages).join("\n").into());
        }
        if self.required.load(Ordering::Relaxed) == 1
            && self.layer_seen.load(Ordering::Relaxed) == 0
        {
            return Err(
                "MX_TEST_VALIDATION=require, but the validation layer was not loaded".into()
            );
        }
        Ok(())
    }
}

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let text = record.args().to_string();
        if text.contains("Insert instance layer \"VK_LAYER_KHRONOS_validation\"") {
            self.layer_seen.store(1, Ordering::Relaxed);
        }
        let hal = record.target().starts_with("wgpu_hal");
        if hal && record.level() <= log::Level::Warn && text.starts_with("VALIDATION") {
            self.messages.lock().unwrap().push(text);
        }
    }

    fn flush(&self) {}
}
