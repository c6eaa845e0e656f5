//! Floating-point environment. C programs can change theirs: by `fesetround`, by `feenableexcept`, or by loading a library
//! compiled with fast-math. Rust code is compiled for the default environment: rounding to nearest, subnormal numbers,
//! no traps. Only in this environment do results have the same bits on every thread.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::arch::asm;

/// Guard: while it lives, the calling thread has the default environment; drop restores the caller's. CPU threads are
/// started under such a guard and keep the default.
#[derive(Debug)]
pub(super) struct Environment {
    callers: Control,
}

/// Type of the control register, MXCSR or FPCR. On other architectures callers must keep the default.
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
        // This also restores the exception flags of x86-64, so those raised by the call are lost.
        write(self.callers);
    }
}

#[cfg(target_arch = "x86_64")]
fn read() -> Control {
    let mut control = 0;
    // SAFETY: the instruction writes the 32-bit register to `control`, which has 32 bits.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}

#[cfg(target_arch = "x86_64")]
fn write(control: Control) {
    // SAFETY: the value is the default or was read from the register, and the guard restores the caller's.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags)) };
}

#[cfg(target_arch = "aarch64")]
fn read() -> Control {
    let control;
    // SAFETY: the instruction only reads the register.
    unsafe { asm!("mrs {}, fpcr", out(reg) control, options(nomem, nostack, preserves_flags)) };
    control
}

#[cfg(target_arch = "aarch64")]
fn write(control: Control) {
    // SAFETY: the value is the default or was read from the register, and the guard restores the caller's.
    unsafe { asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> Control {
    DEFAULT
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write(_: Control) {}
