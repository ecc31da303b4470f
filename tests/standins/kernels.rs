//! What CUDA and HIP share for kernels: modules, launches as tests/emulator/host.c runs them, and a compiler.

/// The functions of modules. `load` and `launch`: the settings that say what those return; `emulate`: of `emulate` in
/// tests/emulator/host.c, and, behind it, of the emulator that it hands lanes to. `host` runs a kernel where it is not emulated.
#[macro_export]
macro_rules! modules {
    ($load:ident $get:ident $launch:ident $unload:ident, load $loads:literal, launch $launches:literal, emulate $emulate:literal, host $host:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $load(module: *mut *mut c_void, image: *const u8) -> c_int {
            let image = unsafe { std::slice::from_raw_parts(image, 4) };
            log(format!(concat!(stringify!($load), " {:?}"), image));
            if setting($loads) != 0 {
                return setting($loads) as c_int;
            }
            made("module", 0x5000);
            unsafe { *module = 0x5000 as *mut c_void };
            current()
        }

        #[unsafe(no_mangle)]
        pub extern "C" fn $unload(module: *mut c_void) -> c_int {
            gone("module", module as u64);
            current()
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(
            function: *mut *mut c_void,
            module: *mut c_void,
            name: *const c_char,
        ) -> c_int {
            let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
            log(format!(concat!(stringify!($get), " {} of {:?}"), name, module));
            unsafe { *function = 0x6000 as *mut c_void };
            current()
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $launch(
            function: *mut c_void,
            gx: c_uint,
            gy: c_uint,
            gz: c_uint,
            bx: c_uint,
            by: c_uint,
            bz: c_uint,
            shared: c_uint,
            stream: *mut c_void,
            arguments: *mut *mut c_void,
            extra: *mut *mut c_void,
        ) -> c_int {
            assert!(extra.is_null());
            let word = |i: usize| unsafe { (*arguments.add(i)).cast::<u32>().read() };
            let address = |i: usize| unsafe { (*arguments.add(i)).cast::<u64>().read() };
            let [m, n, k] = [word(5), word(6), word(7)];
            log(format!(
                "launch {function:?} grid {gx} {gy} {gz} block {bx} {by} {bz} shared {shared} stream {stream:?} m {m} n {n} k {k}"
            ));
            if setting($launches) != 0 {
                return setting($launches) as c_int;
            }
            let operands = [0, 1, 2, 3, 4].map(address);
            if setting($emulate) == 0 {
                $host(operands, [m, n, k]);
                return current();
            }
            type Emulate =
                unsafe extern "C" fn(u64, u64, u64, u64, u64, u32, u32, u32, u32, i32, u64) -> c_int;
            let [a, a_scales, b, b_scales, sums] = operands;
            // All of the kernel's code, on emulated matrix cores.
            let emulate: Emulate = unsafe { std::mem::transmute(setting($emulate) as usize) };
            let cores = setting($emulate + 1);
            let code = unsafe { emulate(a, a_scales, b, b_scales, sums, m, n, k, 1, 1, cores) };
            log(format!("emulated {code}"));
            if code == 0 { current() } else { 719 }
        }
    };
}

/// The functions of NVRTC or hiprtc. `compile`: the setting that says what compiling returns, and, behind it, how many bytes there
/// are said to be, if not as many as there are; `message`: its log.
#[macro_export]
macro_rules! compiler {
    ($create:ident $run:ident $code_size:ident $code:ident $log_size:ident $log:ident $destroy:ident, compile $compile:literal, message $message:literal) => {
        const OBJECT: &[u8] = b"\x7fELF of the stand-in";
        const MESSAGE: &[u8] = $message;

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $create(
            program: *mut *mut c_void,
            source: *const c_char,
            name: *const c_char,
            headers: c_int,
            _: *const *const c_char,
            _: *const *const c_char,
        ) -> c_int {
            let (source, name) = unsafe { (CStr::from_ptr(source), CStr::from_ptr(name)) };
            let kernel = source.to_str().unwrap().contains("KERNEL mx_matmul_mxf4(");
            let name = name.to_str().unwrap();
            log(format!(
                concat!(stringify!($create), " {} headers {} kernel {}"),
                name, headers, kernel
            ));
            made("program", 0x7000);
            unsafe { *program = 0x7000 as *mut c_void };
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $run(
            _: *mut c_void,
            count: c_int,
            options: *const *const c_char,
        ) -> c_int {
            for i in 0..count as usize {
                let option = unsafe { CStr::from_ptr(*options.add(i)) };
                log(format!(concat!(stringify!($run), " {}"), option.to_str().unwrap()));
            }
            setting($compile) as c_int
        }

        $crate::text!($code_size $code OBJECT $compile);
        $crate::text!($log_size $log MESSAGE $compile);

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $destroy(program: *mut *mut c_void) -> c_int {
            log(stringify!($destroy));
            gone("program", unsafe { *program } as u64);
            0
        }
    };
}

#[macro_export]
macro_rules! text {
    ($size:ident $get:ident $text:ident $compile:literal) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $size(_: *mut c_void, bytes: *mut usize) -> c_int {
            let claimed = setting($compile + 1) as usize;
            unsafe { *bytes = if claimed > 0 { claimed } else { $text.len() } };
            0
        }

        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(_: *mut c_void, to: *mut u8) -> c_int {
            unsafe { std::ptr::copy_nonoverlapping($text.as_ptr(), to, $text.len()) };
            0
        }
    };
}
