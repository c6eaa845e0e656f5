# Defines the targets of gradblend-config.cmake, for an installed package and for CMakeLists.txt. Inputs:
# gradblend_include, a folder; gradblend_shared and gradblend_static, files, of which one may be empty; gradblend_scope,
# GLOBAL or empty.

# The system libraries of the static library (rustc --print native-static-libs).
set(gradblend_native -lgcc_s -lutil -lrt -lpthread -lm -ldl -lc)
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    set(gradblend_native "") # all in the C library of macOS
endif()

if(gradblend_shared)
    add_library(gradblend::shared SHARED IMPORTED ${gradblend_scope})
    set_target_properties(gradblend::shared PROPERTIES
        IMPORTED_LOCATION "${gradblend_shared}"
        INTERFACE_INCLUDE_DIRECTORIES "${gradblend_include}")
endif()
if(gradblend_static)
    add_library(gradblend::static STATIC IMPORTED ${gradblend_scope})
    set_target_properties(gradblend::static PROPERTIES
        IMPORTED_LOCATION "${gradblend_static}"
        INTERFACE_INCLUDE_DIRECTORIES "${gradblend_include}"
        INTERFACE_LINK_LIBRARIES "${gradblend_native}")
endif()
if(gradblend_static AND (NOT gradblend_shared OR (DEFINED BUILD_SHARED_LIBS AND NOT BUILD_SHARED_LIBS)))
    add_library(gradblend::gradblend ALIAS gradblend::static)
else()
    add_library(gradblend::gradblend ALIAS gradblend::shared)
endif()
