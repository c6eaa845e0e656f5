//! The floating-point environment. C programs change theirs, by `fesetround`, `feenableexcept`, or a library that was
//! compiled with fast mathematics; Rust code is compiled for the default one: rounding to nearest, subnormal numbers as
//! they are, no traps. Only in that are results the same bits on every thread.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::arch::asm;

/// The calling thread has the default environment as long as this lives, and then its own again. CPU threads are started
/// within such a time, and keep it.
#[derive(Debug)]
pub(super) struct Environment {
    callers: Control,
}

/// The register that has the environment, MXCSR or FPCR. Elsewhere callers must keep the default.
#[cfg(not(target_arch = "aarch64"))]
type Control = u32;
#[cfg(target_arch = "aarch64")]
type Control = u64;

/// All exceptions masked, none raised; round to nearest; no flush to zero, no subnormals as zero.
const DEFAULT: Control = if cfg!(target_arch = "x86_64") { 0x1f80 } else { 0 };

impl Environment {
    pub(super) fn enter() -> Self {
        let callers = read();
        if callers != DEFAULT {
            write(DEFAULT);
        }
        Environment { callers }
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        // With the exceptions that were raised before, and without those of the call; AArch64 has these elsewhere.
        write(self.callers);
    }
}

#[cfg(target_arch = "x86_64")]
fn read() -> Control {
    let mut control = 0;
    // SAFETY: stores the register, 32 bits, to a variable of that size.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}

#[cfg(target_arch = "x86_64")]
fn write(control: Control) {
    // SAFETY: the default, or what the register had before; the caller's code runs with its own again.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
fn read() -> Control {
    let control;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, fpcr", out(reg) control, options(nomem, nostack, preserves_flags)) };
    control
}

#[cfg(target_arch = "aarch64")]
fn write(control: Control) {
    // SAFETY: the default, or what the register had before; the caller's code runs with its own again.
    unsafe { asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> Control {
    DEFAULT
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write(_: Control) {}
