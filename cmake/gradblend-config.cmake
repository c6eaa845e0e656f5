# find_package(gradblend 0.1 REQUIRED), CMake 3.20 or later, gives
#
#     gradblend::shared, gradblend::static   the two libraries, as far as they are installed
#     gradblend::gradblend                   one of them: the static one where BUILD_SHARED_LIBS is set to OFF, else the
#                                            shared one; where only one is installed, that one
#
# It finds everything from its own place, PREFIX/share/gradblend/cmake, so that a prefix can be moved, and serves what
# `cmake --install` and `cargo cinstall` install.
cmake_minimum_required(VERSION 3.20)
if(TARGET gradblend::gradblend)
    return()
endif()
set(gradblend_FOUND FALSE)
if(gradblend_FIND_COMPONENTS)
    set(gradblend_NOT_FOUND_MESSAGE "It has no components. To choose, link gradblend::shared or gradblend::static.")
    return()
endif()

get_filename_component(gradblend_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(gradblend_include "${gradblend_prefix}/include")
set(gradblend_suffix ".so")
if(CMAKE_SYSTEM_NAME STREQUAL "Darwin")
    set(gradblend_suffix ".dylib")
endif()
# Debian has a folder for each architecture, others have lib64. The last is for a prefix that was made on Debian and
# brought elsewhere.
file(GLOB gradblend_folders "${gradblend_prefix}/lib/*-linux-*")
list(PREPEND gradblend_folders "${gradblend_prefix}/lib64" "${gradblend_prefix}/lib")
if(CMAKE_LIBRARY_ARCHITECTURE)
    list(PREPEND gradblend_folders "${gradblend_prefix}/lib/${CMAKE_LIBRARY_ARCHITECTURE}")
endif()
foreach(folder IN LISTS gradblend_folders)
    set(gradblend_shared "")
    set(gradblend_static "")
    if(EXISTS "${folder}/libgradblend${gradblend_suffix}")
        set(gradblend_shared "${folder}/libgradblend${gradblend_suffix}")
        set(gradblend_FOUND TRUE)
    endif()
    if(EXISTS "${folder}/libgradblend.a")
        set(gradblend_static "${folder}/libgradblend.a")
        set(gradblend_FOUND TRUE)
    endif()
    if(gradblend_FOUND)
        break()
    endif()
endforeach()
if(NOT gradblend_FOUND)
    string(REPLACE ";" ", " gradblend_folders "${gradblend_folders}")
    set(gradblend_NOT_FOUND_MESSAGE "There is no libgradblend${gradblend_suffix} or .a in ${gradblend_folders}.")
    return()
endif()
set(gradblend_scope "")
include("${CMAKE_CURRENT_LIST_DIR}/gradblend-targets.cmake")
